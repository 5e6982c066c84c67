"""Save and restore adapted weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

import metalearn
from metalearn import Params
from metalearn.core.errors import RunError
from metalearn.inference.learner import NotAdaptedError
from metalearn.pretrained.model_file import tensor_digest
from tests.inference.factories import query, support


@pytest.mark.parametrize(("name", "ways"), [("maml", 5), ("maml", 7), ("maml_pp", 7), ("protonet", 5), ("cavia", 5)])
def test_restored_weights_predict_bitwise_the_same(
    name: str, ways: int, run: Path, runs: dict[str, Path], tmp_path: Path
) -> None:
    folder = {**runs, "maml": run}[name]
    learner = metalearn.load(folder, "cpu").adapt(*support(ways), steps=2)
    path = learner.save(tmp_path / "new" / "adapted.safetensors")
    again = metalearn.load(folder, "cpu").restore(path)
    assert (again.classes_, again.steps_) == (learner.classes_, 2)
    for transductive in (False, True):
        first, second = (one.predict_proba(query(ways), transductive=transductive) for one in (learner, again))
        assert torch.equal(first, second)
    assert {p.name for p in path.parent.iterdir()} == {path.name}


def test_saved_file_has_metadata(run: Path, tmp_path: Path) -> None:
    path = metalearn.load(run, "cpu").adapt(support()[0], [1, 1, 0, 0, 2, 2, 3, 3, 7, 7]).save(tmp_path / "a")
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        assert file.get_tensor("head.weight").shape == (5, 8)
    assert json.loads(metadata["classes"]) == [0, 1, 2, 3, 7]
    steps = str(metalearn.load(run, "cpu").config.inner.eval_steps)
    assert (metadata["algorithm"], metadata["steps"], metadata["run"]) == ("maml", steps, str(run))


def test_save_raises_when_file_exists(run: Path, tmp_path: Path) -> None:
    learner, path = metalearn.load(run, "cpu").adapt(*support()), tmp_path / "a"
    path.write_text("mine")
    with pytest.raises(RunError, match=r"a exists, and is not overwritten"):
        learner.save(path)
    assert path.read_text() == "mine"
    learner.save(path, overwrite=True)
    assert metalearn.load(run, "cpu").restore(path).classes_ == learner.classes_
    with pytest.raises(RunError, match=r"is a folder; name a file in it"):
        learner.save(tmp_path)


def test_save_raises_when_labels_are_tuples(run: Path, tmp_path: Path) -> None:
    learner = metalearn.load(run, "cpu").adapt(support()[0], [(i // 2, 0) for i in range(10)])
    with pytest.raises(RunError, match=r"label \(0, 0\) is a tuple, and only strings and integers can be saved"):
        learner.save(tmp_path / "a")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def saved(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return metalearn.load(run, "cpu").adapt(*support()).save(tmp_path_factory.mktemp("saved") / "a.safetensors")


def test_restore_raises_with_differences_when_run_is_another(saved: Path, runs: dict[str, Path], run: Path) -> None:
    with pytest.raises(RunError, match=r"adapted from .*maml, which is another model") as error:
        metalearn.load(runs["anil"], "cpu").restore(saved)
    assert "algorithm.name: maml in the file, anil in the run" in str(error.value)
    assert "model.width" not in str(error.value)
    again = metalearn.load(run, "cpu")
    again.theta["head.bias"] += 1  # as of a run that went on to a better checkpoint
    with pytest.raises(RunError, match=r"the configuration is the same; the run was trained again"):
        again.restore(saved)


def test_restore_raises_when_file_is_damaged(saved: Path, run: Path, tmp_path: Path) -> None:
    learner, path, data = metalearn.load(run, "cpu"), tmp_path / "a", bytearray(saved.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(RunError, match=r"a is damaged: the SHA-256 in it is that of other weights"):
        learner.restore(path)
    path.write_bytes(data[:-5])
    with pytest.raises(RunError, match=r"a cannot be read as a safetensors file"):
        learner.restore(path)
    with pytest.raises(RunError, match=r"b: there is no such file"):
        learner.restore(tmp_path / "b")
    path.write_bytes(safetensors.torch.save({"w": torch.zeros(1)}))
    with pytest.raises(RunError, match=r"a holds no adapted weights of metalearn"):
        learner.restore(path)
    with pytest.raises(NotAdaptedError):
        learner.predict(query())


def write_modified(saved: Path, path: Path, tensors: Params | None = None, **other: str) -> Path:
    """Write the file with other metadata or weights, and the SHA-256 of its new content."""
    with safetensors.safe_open(saved, framework="pt") as file:
        metadata = file.metadata()
    weights = {**safetensors.torch.load_file(saved), **(tensors or {})}
    path.write_bytes(safetensors.torch.save(weights, {**metadata, "content.sha256": tensor_digest(weights), **other}))
    return path


def test_restore_raises_when_metadata_do_not_match(saved: Path, run: Path, tmp_path: Path) -> None:
    learner = metalearn.load(run, "cpu")
    assert learner.restore(write_modified(saved, tmp_path / "a")).classes_ == ["b", "c", "d", "e", "f"]
    for message, tensors, metadata in (
        (r"'head\.bias' is \(5,\) in it and \(2,\)", {}, {"classes": '["x", "y"]'}),
        ("its metadata are incomplete", {}, {"classes": "["}),
        (r"'features\.0\.0\.weight' is \(1,\) in it", {"features.0.0.weight": torch.zeros(1)}, {}),
    ):
        path = write_modified(saved, tmp_path / "a", tensors, **metadata)
        with pytest.raises(RunError, match=message):
            learner.restore(path)
