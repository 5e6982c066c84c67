"""Commands with a user's own model and data, from a file in the working directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.commands.process import SMALL, command

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, ways, width=8):
        super().__init__()
        self.body, self.head = nn.Linear(28 * 28, width), nn.Linear(width, ways)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x.flatten(1))))

def drawings(size=28):
    return {split: torch.rand(6, 7, 1, size, size) for split in ("train", "validation", "test")}
"""
BUDGET = [override for override in SMALL if not override.startswith(("model", "data"))]
DATA = ["data=custom", "data.target=nets:drawings"]
OWN = ["model=custom", "model.target=nets:Net", *DATA, *BUDGET]


@pytest.fixture(autouse=True)
def _code(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(NET)
    # Found first by `python -m`, and by no command: none needs it of the working directory.
    (tmp_path / "random.py").write_text("raise SystemExit('not the random of the standard library')")


def test_own_model_is_trained_evaluated_and_adapted(tmp_path: Path) -> None:
    command("train.py", *OWN, "model.options={width: 4}", "hydra.run.dir=run", cwd=tmp_path)
    command("train.py", *OWN, "model.options.width=4", "hydra.run.dir=run", "run.resume=true", cwd=tmp_path)

    refused = command("evaluate.py", "run.dir=run", cwd=tmp_path, code=2)
    assert (
        "names code to run: data.target=nets:drawings, model.target=nets:Net, model.options.width=4. " in refused.stderr
    )
    assert not (tmp_path / "run" / "evaluations").exists()
    command("evaluate.py", "run.dir=run", "run.trust_code=true", "hydra.run.dir=again", cwd=tmp_path)
    accuracy = [json.loads((tmp_path / run / "metrics.json").read_text())["test.accuracy"] for run in ("run", "again")]
    assert accuracy[0] == accuracy[1]

    for folder in ("support", "query"):
        for name in ("a", "b", "c"):
            (tmp_path / folder / name).mkdir(parents=True)
            pixels = torch.randint(256, (30, 30), dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(tmp_path / folder / name / "1.png")
    keys = ["run.dir=run", "support=support", "query=query", "hydra.run.dir=out"]
    assert "names code to run" in command("adapt.py", *keys, cwd=tmp_path, code=2).stderr
    command("adapt.py", *keys, "run.trust_code=true", cwd=tmp_path)
    assert (tmp_path / "out" / "predictions.csv").is_file()


def test_own_models_are_compared_on_own_data(tmp_path: Path) -> None:
    own = "model=custom model.target=nets:Net model.options.width=4"
    variants = f"compare.variants=['{own}','model=conv4 model.width=8']"
    budget = ["compare.seeds=[0]", "compare.steps=[1]", "compare.repeats=2", "compare.jobs=2"]
    command("compare.py", *DATA, *BUDGET, variants, *budget, "hydra.run.dir=mine", cwd=tmp_path)
    content = json.loads((tmp_path / "mine" / "results.json").read_text())
    assert content["complete"]
    assert [variant["name"] for variant in content["variants"]] == [
        "model-custom,target-nets_Net,width-4",
        "model-conv4,width-8",
    ]


@pytest.mark.parametrize(
    ("target", "message"),
    [("nets:Nett", "nets has no Nett. Did you mean Net"), ("net:Net", "there is no module net;")],
)
def test_comparison_ends_before_it_starts_a_run_when_code_is_not_there(
    target: str, message: str, tmp_path: Path
) -> None:
    variants = f"compare.variants=['model=conv4','model=custom model.target={target}']"
    done = command("compare.py", *DATA, *BUDGET, variants, "hydra.run.dir=mine", cwd=tmp_path, code=2)
    assert f"compare.variants, 'model=custom model.target={target}': model.target={target}: {message}" in done.stderr
    assert not list(tmp_path.glob("mine/*/"))
