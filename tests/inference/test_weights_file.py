"""Save and restore adapted weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import metalearn
from metalearn import Params
from metalearn.core.errors import RunError
from metalearn.inference.learner import NotAdaptedError
from metalearn.pretrained.model_file import read_safetensors, safetensors_bytes, tensor_digest
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
    with pytest.raises(RunError, match=r"a is damaged: the SHA-256 in it is that of another content"):
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
    weights, metadata = read_safetensors(saved)
    path.write_bytes(safetensors_bytes({**weights, **(tensors or {})}, {**metadata, **other}))
    return path


NESTED = "[" * 100_000
HOSTILE: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "other classes": (r"'head\.bias' is \(5,\) in it and \(2,\)", {}, {"classes": '["x", "y"]'}),
    "no class": (r"'head\.bias' is \(5,\) in it and \(0,\)", {}, {"classes": "[]"}),
    "broken classes": ("its metadata are incomplete or wrong", {}, {"classes": "["}),
    "nested classes": ("its metadata are incomplete or wrong .*recursion", {}, {"classes": NESTED}),
    "unhashable classes": (r"classes=\[\['a'\], 'b'\]: must be a list of strings", {}, {"classes": '[["a"], "b"]'}),
    "numbers as classes": (r"classes=\[1\.5, True, None\]: must be", {}, {"classes": "[1.5, true, null]"}),
    "text as classes": ("classes='abcde': must be a list", {}, {"classes": '"abcde"'}),
    "one class twice": ("one stands there twice", {}, {"classes": '["a", "b", "c", "d", "a"]'}),
    "negative steps": ("steps='-1': must be a whole number from 0 to 999999999", {}, {"steps": "-1"}),
    "endless steps": ("steps='1000000000000': must be a whole number", {}, {"steps": "1000000000000"}),
    "long steps": (r"steps='1{9,12}\.\.\.1{9,15}': must be", {}, {"steps": "1" * 100_000}),
    "steps that are no number": ("steps='two': must be a whole number", {}, {"steps": "two"}),
    "nested configuration": ("its metadata are .*recursion", {}, {"config": NESTED, "theta.sha256": "0"}),
    "configuration that is no JSON": ("its metadata are .*Expecting", {}, {"config": "lr: 1", "theta.sha256": "0"}),
    "configuration of no keys": (r"config=\[1\]: must be keys", {}, {"config": "[1]", "theta.sha256": "0"}),
    "other weights": (r"'features\.0\.0\.weight' is \(1,\) in it", {"features.0.0.weight": torch.zeros(1)}, {}),
    "bfloat16": (r"'more' is \(1,\) in it and missing", {"more": torch.zeros(1, dtype=torch.bfloat16)}, {}),
    "other support images": (r"'support::x' is \(3,\) in it and \(3, 1, 28, 28\)", {"support::x": torch.zeros(3)}, {}),
    "an earlier format": (
        "the SHA-256 in it is that of other weights",
        {},
        {"format": "metalearn-adapted-1"},
    ),
    "another format": ("holds no adapted weights of metalearn", {}, {"format": "metalearn-adapted-3"}),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_restore_raises_when_content_is_hostile(case: str, saved: Path, run: Path, tmp_path: Path) -> None:
    message, tensors, metadata = HOSTILE[case]
    path = write_modified(saved, tmp_path / "a", tensors, **metadata)
    with pytest.raises(RunError, match=message) as error:
        metalearn.load(run, "cpu").restore(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 1000


def test_restore_raises_when_digest_is_missing_or_forged(saved: Path, run: Path, tmp_path: Path) -> None:
    learner, path = metalearn.load(run, "cpu"), tmp_path / "a"
    weights, metadata = read_safetensors(saved)
    for digest in ({}, {"sha257": metadata["sha256"]}, {"sha256": tensor_digest(weights)}):
        rest = {name: text for name, text in metadata.items() if name != "sha256"}
        path.write_bytes(safetensors.torch.save(weights, {**rest, **digest}))
        with pytest.raises(RunError, match=r"a is damaged: the SHA-256 in it is that of another content"):
            learner.restore(path)
    assert learner.restore(write_modified(saved, path)).classes_ == ["b", "c", "d", "e", "f"]


def test_weights_of_an_earlier_release_are_restored(saved: Path, run: Path, tmp_path: Path) -> None:
    weights, metadata = read_safetensors(saved)
    metadata = {**metadata, "format": "metalearn-adapted-1", "content.sha256": tensor_digest(weights)}
    del metadata["sha256"]
    path = tmp_path / "a"
    path.write_bytes(safetensors.torch.save(weights, metadata))
    former, now = (metalearn.load(run, "cpu").restore(one) for one in (path, saved))
    assert (former.classes_, former.steps_) == (now.classes_, now.steps_)
    assert torch.equal(former.predict_proba(query()), now.predict_proba(query()))


def test_size_that_no_tensor_has_is_an_error(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}}).encode()
    (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(RunError, match="a cannot be read as a safetensors file"):
        read_safetensors(tmp_path / "a")


def test_classes_of_a_regression_are_an_error(sinusoid: Path, tmp_path: Path) -> None:
    learner = metalearn.load(sinusoid, "cpu").adapt([0.0, 1.0], [0.0, 1.0])
    saved = learner.save(tmp_path / "saved")
    assert learner.restore(saved).classes_ == []
    with pytest.raises(RunError, match=r"its classes are \['a'\], which do not fit the run"):
        learner.restore(write_modified(saved, tmp_path / "a", classes='["a"]'))
