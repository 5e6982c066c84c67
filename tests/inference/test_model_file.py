"""A trained model as one file: loaded, adapted, tested and trained further like a run's folder."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

import metalearn
from metalearn.commands.main import check_evaluate
from metalearn.commands.output_folders import register_resolvers, run_dir_errors
from metalearn.config.commands_schema import EvaluateConfig
from metalearn.config.compose import compose, to_dataclass
from metalearn.config.options import AnyData, ImagesConfig, OmniglotConfig
from metalearn.config.run_config import load_trusted_config, resolve_data, to_yaml
from metalearn.core.errors import MetalearnError, RunError
from metalearn.core.params import relative_error
from metalearn.pretrained import model_file
from metalearn.pretrained.model_file import find_run, pretrained_models
from metalearn.training.checkpoints import load_best
from tests.config.factories import train_config
from tests.inference.factories import query, support
from tests.training.run_folders import SMALL, replace_config, untrained
from tests.training.run_folders import run as train

OMNIGLOT = OmniglotConfig("omniglot", "/home/me/drawings", None, "classic", True, False)
IMAGES = ImagesConfig("images", "/home/me/drawings", 28, 1, [0.6, 0.2, 0.2], 0, None, "stop")
NAMES = ("maml", "meta_sgd", "meta_curvature", "maml_pp", "protonet", "cavia")


@pytest.mark.parametrize("name", NAMES)
def test_file_predicts_as_the_folder_does(name: str, run: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    of_folder = metalearn.load({**runs, "maml": run}[name], "cpu")
    of_file = metalearn.load(of_folder.export(tmp_path / "new" / "model.safetensors"), "cpu")
    assert of_file.config == of_folder.config
    assert (of_file.iteration, of_file.validation_score) == (of_folder.iteration, of_folder.validation_score)
    for transductive in (False, True):
        first, second = (
            one.adapt(*support()).predict_proba(query(), transductive=transductive) for one in (of_folder, of_file)
        )
        assert torch.equal(first, second)
    weights = of_file.save(tmp_path / "adapted.safetensors")
    assert of_folder.restore(weights).classes_ == of_file.classes_, "both are the same model"


def test_loaded_model_does_not_change_with_its_file(run: Path, tmp_path: Path) -> None:
    path = metalearn.load(run, "cpu").export(tmp_path / "model.safetensors")
    learner = metalearn.load(path, "cpu")
    before = {name: t.clone() for name, t in learner.theta.items()}
    with path.open("r+b") as file:  # as cp does, in place
        file.write(bytes(path.stat().st_size))
    assert all(torch.equal(t, before[name]) for name, t in learner.theta.items())
    assert all(t.data_ptr() % 64 == 0 for t in learner.theta.values()), "aligned as tensors of a run's folder are"


def test_the_same_model_has_the_same_bytes(run: Path, tmp_path: Path) -> None:
    learner = metalearn.load(run, "cpu")
    assert len({learner.to_bytes() for _ in range(8)}) == 1
    learner.adapt(*support())
    saved = [learner.save(tmp_path / f"{i}.safetensors").read_bytes() for i in range(8)]
    assert len({*saved}) == 1


def test_card_is_of_the_test_unless_it_is_given(run: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    learner = metalearn.load(run, "cpu")
    assert learner.card == json.loads((run / "metrics.json").read_text())
    assert metalearn.load(runs["anil"], "cpu").card == {}, "it is not finished"
    path = learner.export(tmp_path / "model.safetensors")
    assert metalearn.load(path, "cpu").card == learner.card
    assert learner.export(path, card={"licence": "MIT"}, overwrite=True) == path
    with pytest.raises(
        RunError, match=r"card=.*torch\.float32.*: this cannot be written as JSON \(.*dtype.*\); give text"
    ):
        learner.export(tmp_path / "other.safetensors", card={"dtype": torch.float32})
    assert not (tmp_path / "other.safetensors").exists()
    assert metalearn.load(path, "cpu").card == {"licence": "MIT"}


def test_file_is_not_overwritten(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine"
    path.write_text("mine")
    with pytest.raises(RunError, match=r"mine exists, and is not overwritten"):
        metalearn.load(run, "cpu").export(path)
    assert path.read_text() == "mine"
    with pytest.raises(RunError, match=r"is a folder; name a file in it, as .*model\.safetensors"):
        metalearn.load(run, "cpu").export(tmp_path)


@pytest.mark.parametrize("data", [OMNIGLOT, IMAGES])
def test_file_holds_no_path_of_this_machine(data: AnyData, tmp_path: Path) -> None:
    folder = untrained(tmp_path / "run", *SMALL)
    config = dataclasses.replace(train_config(*SMALL, "run.init_from=/home/me/run"), data=data)
    replace_config(folder, to_yaml(config))
    assert (folder / "config.yaml").read_text().count("/home/me") == 2
    path = metalearn.load(folder, "cpu").export(tmp_path / "model.safetensors")
    assert b"/home/me" not in path.read_bytes()
    assert metalearn.load(path, "cpu").example_shape == metalearn.load(folder, "cpu").example_shape


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as a safetensors file"),
        (b"PK\x03\x04", "cannot be read as a safetensors file"),
        (safetensors.torch.save({"w": torch.ones(2)}), "holds no model of metalearn"),
        (safetensors.torch.save({"w": torch.ones(2)}, {"format": "metalearn-model-1"}), "its metadata are incomplete"),
        (
            safetensors.torch.save({}, {"format": "metalearn-model-1", "card": "[" * 100_000, "config.yaml": ""}),
            "its metadata are incomplete",
        ),
        (
            safetensors.torch.save(
                {},
                {
                    "format": "metalearn-model-1",
                    "card": "[1]",
                    "config.yaml": "",
                    "iteration": "1",
                    "validation_score": "0.5",
                },
            ),
            "its metadata are incomplete",
        ),
    ],
)
def test_other_files_raise(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(RunError, match=message):
        metalearn.load(path)


def test_file_that_names_code_is_not_trusted(tmp_path: Path) -> None:
    code = ["model=custom", "model.target=tests.inference.factories:network"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_file, "PRETRAINED", tmp_path)
        record = model_file.ModelRecord(to_yaml(train_config("data=glyphs", *code)), 1, 0.5, {})
        (tmp_path / "evil.safetensors").write_bytes(model_file.model_bytes({"w": torch.ones(1)}, record))
        for run in (tmp_path / "evil.safetensors", "evil"):
            with pytest.raises(MetalearnError, match=r"names code to run: model\.target"):
                load_trusted_config(run, trust_code=False)


@pytest.fixture
def shipped(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Ship the trained run as ``ours-5w1s``, and work in another folder."""
    monkeypatch.setattr(model_file, "PRETRAINED", tmp_path / "pretrained")
    metalearn.load(run, "cpu").export(tmp_path / "pretrained" / "ours-5w1s.safetensors")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return "ours-5w1s"


def test_shipped_model_goes_by_its_name(shipped: str, run: Path) -> None:
    assert pretrained_models() == [shipped]
    assert metalearn.load(shipped, "cpu").adapt(*support()).predict(query()) == (
        metalearn.load(run, "cpu").adapt(*support()).predict(query())
    )
    assert run_dir_errors(shipped) == []
    with pytest.raises(RunError, match=r"ours-5w5s: there is no such folder of a run.*Did you mean ours-5w1s\?"):
        metalearn.load("ours-5w5s")


def test_run_of_that_name_counts_more(shipped: str, run: Path) -> None:
    own = Path(shipped)
    own.mkdir()  # as training makes for all runs on a task
    assert find_run(shipped).parent == model_file.PRETRAINED
    (own / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    assert find_run(shipped) == own


def test_commands_take_a_file_and_a_name(shipped: str, run: Path) -> None:
    register_resolvers()
    path = metalearn.load(shipped, "cpu").export("mine.safetensors")
    for given, name in ((path, "mine"), (shipped, shipped), (run, None)):
        config = compose("evaluate", [f"run={given}"], return_hydra_config=True)
        check_evaluate(to_dataclass(compose("evaluate", [f"run={given}"]), EvaluateConfig))
        expected = f"outputs/evaluations/{name}/" if name else f"{run}/evaluations/"
        assert config.hydra.run.dir.startswith(expected)


def test_parameters_of_another_kind_of_model_are_refused(shipped: str, tmp_path: Path) -> None:
    for other in ("algorithm=meta_curvature", "task.ways=3"):
        with pytest.raises(RunError, match=r"ours-5w1s: .*It was trained with algorithm=maml task\.ways=5 model=conv4"):
            train(tmp_path / "run", *SMALL, other, f"run.init_from={shipped}")
    with pytest.raises(RunError, match=r"run\.init_from=.*ours-5w5s: there is no such .*Did you mean ours-5w1s\?"):
        train(tmp_path / "run", *SMALL, "run.init_from=ours-5w5s")


def test_card_of_another_checkpoint_is_left_out(run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps({**metrics, "validation.best_iteration": 1}))
    assert metalearn.load(folder, "cpu").card == {}, "the run went on and was tested since"
    (folder / "metrics.json").write_text("[1]")
    with pytest.raises(RunError, match=r"metrics\.json does not hold the metrics of a finished run"):
        metalearn.load(folder, "cpu")


def test_training_begins_with_a_shipped_model(shipped: str, run: Path, tmp_path: Path) -> None:
    few = [*SMALL, "outer.iterations=1", "eval.every=1", "eval.validation_episodes=2", "eval.episodes=2"]
    train(tmp_path / "first", *few, f"run.init_from={shipped}")
    train(tmp_path / "second", *few, f"run.init_from={run}")
    experiment = metalearn.load(run, "cpu")
    first, second = (
        load_best(tmp_path / name, like=experiment.theta, device=experiment.device) for name in ("first", "second")
    )
    assert relative_error(first.params, second.params) == 0
    assert resolve_data(train_config(*SMALL, f"run.init_from={shipped}")).run.init_from == shipped


def test_runs_in_a_folder_that_is_none_are_listed(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"holds no config\.yaml; name one that training has made\."):
        find_run(tmp_path)
    for age, name in enumerate(("new", "old")):
        config = tmp_path / "glyphs-5w1s" / name / "config.yaml"
        config.parent.mkdir(parents=True)
        config.touch()
        os.utime(config, (1000 - age, 1000 - age))
    listed = f"name one of those in it, the latest first:\n  {tmp_path}/glyphs-5w1s/new\n  {tmp_path}/glyphs-5w1s/old"
    with pytest.raises(RunError, match=f"{re.escape(listed)}$"):
        find_run(tmp_path)
