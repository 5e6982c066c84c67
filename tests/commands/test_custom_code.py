"""Commands with a user's own model, from a file in the working directory."""

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
"""
OWN = ["model=custom", "model.target=nets:Net", *(override for override in SMALL if not override.startswith("model"))]


@pytest.fixture(autouse=True)
def _code(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(NET)


def test_own_model_is_trained_evaluated_and_adapted(tmp_path: Path) -> None:
    command("train.py", *OWN, "model.options={width: 4}", "hydra.run.dir=run", cwd=tmp_path)
    command("train.py", *OWN, "model.options.width=4", "hydra.run.dir=run", "run.resume=true", cwd=tmp_path)

    refused = command("evaluate.py", "run.dir=run", cwd=tmp_path, code=2)
    assert "names code to run: model.target=nets:Net, model.options.width=4. " in refused.stderr
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


def test_own_models_are_compared(tmp_path: Path) -> None:
    own = "model=custom model.target=nets:Net model.options.width=4"
    variants = f"compare.variants=['{own}','model=conv4 model.width=8']"
    base = [override for override in SMALL if not override.startswith("model")]
    budget = ["compare.seeds=[0]", "compare.steps=[1]", "compare.repeats=2", "compare.jobs=2"]
    command("compare.py", *base, variants, *budget, "hydra.run.dir=mine", cwd=tmp_path)
    content = json.loads((tmp_path / "mine" / "results.json").read_text())
    assert content["complete"]
    assert [variant["name"] for variant in content["variants"]] == [
        "model-custom,target-nets_Net,width-4",
        "model-conv4,width-8",
    ]
