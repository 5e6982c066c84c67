"""``run.init_from``: a new run starts from another run's best parameters."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import pytest

from metalearn.config.run_config import load_run_config
from metalearn.core.errors import RunError
from metalearn.training.checkpoints import best_path
from metalearn.training.tracking.event_files import read_scalars
from tests.faults.processes import load_state
from tests.faults.runs import SMALL, assert_steps_increase, metrics_without_times, tensors_to_bytes
from tests.training.run_folders import run, run_interrupted

AT_VALIDATIONS = [*SMALL, "run.checkpoint_every_s=null"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "run"
    run(folder, *AT_VALIDATIONS)
    return folder


def validations(folder: Path) -> list[tuple[int, float]]:
    return [(p.step, p.value) for p in read_scalars(folder)["validation/accuracy"]]


def test_init_from_starts_with_the_best_parameters(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = {path: path.stat().st_mtime_ns for path in source.rglob("*")}
    with caplog.at_level(logging.INFO):
        metrics = run(tmp_path, *AT_VALIDATIONS, f"run.init_from={source}", "outer.iterations=32", "outer.lr=1e-3")
    best = metrics_without_times(source)
    assert metrics["iterations"] == 32
    assert validations(tmp_path)[0][1] == pytest.approx(best["validation.best_accuracy"]), "on the same tasks"
    assert [step for step, _ in validations(tmp_path)] == [0, 8, 16, 24, 32]
    assert metrics["validation.best_accuracy"] >= best["validation.best_accuracy"]
    assert f"best parameters of {source}, those of its meta-step {best['validation.best_iteration']}" in caplog.text
    assert load_run_config(tmp_path / "config.yaml").run.init_from == str(source)
    assert before == {path: path.stat().st_mtime_ns for path in source.rglob("*")}
    assert_steps_increase(tmp_path)


def test_init_from_takes_other_data_and_a_relative_path(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run(tmp_path / "run", *AT_VALIDATIONS, f"run.init_from={os.path.relpath(source)}", "data.jitter=0.2")
    assert Path(load_run_config(tmp_path / "run" / "config.yaml").run.init_from or "").is_absolute()


def test_init_from_raises_when_shapes_differ_and_leaves_the_folder_free(source: Path, tmp_path: Path) -> None:
    with pytest.raises(
        RunError, match=r"run\.init_from=.*the checkpoint does not fit the model: parameter '.*' is \(8.*and \(9"
    ):
        run(tmp_path, *AT_VALIDATIONS, f"run.init_from={source}", "model.hidden=[9]")
    run(tmp_path, *AT_VALIDATIONS, "outer.iterations=1")


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("missing", r"run\.init_from=.*missing: there is no such folder"),
        ("empty", r"run\.init_from=.*best\.pt does not exist\. The run has not reached its first validation"),
        ("run", r"run\.init_from=.*run: this is the run's own folder.*run\.resume=true"),
    ],
)
def test_init_from_raises_for_an_unusable_folder(folder: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match=message):
        run(tmp_path / "run", *AT_VALIDATIONS, f"run.init_from={tmp_path / folder}")
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize("iteration", [0, 5, 20])
def test_resume_of_a_run_with_init_from_is_bitwise_equal(iteration: int, source: Path, tmp_path: Path) -> None:
    """After the first checkpoint the source is no longer needed."""
    copy = Path(shutil.copytree(source, tmp_path / "source"))
    overrides = [*AT_VALIDATIONS, f"run.init_from={copy}"]
    run(tmp_path / "whole", *overrides)
    run_interrupted(tmp_path / "halves", iteration, *overrides)
    shutil.rmtree(copy)
    run(tmp_path / "halves", *overrides, "run.resume=true")
    assert metrics_without_times(tmp_path / "halves") == metrics_without_times(tmp_path / "whole")
    assert tensors_to_bytes(load_state(tmp_path / "halves")["state"]) == tensors_to_bytes(
        load_state(tmp_path / "whole")["state"]
    )
    assert validations(tmp_path / "halves") == validations(tmp_path / "whole")


def test_resume_before_the_first_checkpoint_starts_from_the_source_again(source: Path, tmp_path: Path) -> None:
    overrides = [*AT_VALIDATIONS, f"run.init_from={source}"]
    run(tmp_path / "whole", *overrides)
    run_interrupted(tmp_path / "run", 0, *overrides)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    run(tmp_path / "run", *overrides, "run.resume=true")
    assert metrics_without_times(tmp_path / "run") == metrics_without_times(tmp_path / "whole")
    assert best_path(tmp_path / "run").exists()


def test_resume_raises_without_the_same_init_from(source: Path, tmp_path: Path) -> None:
    run(tmp_path, *AT_VALIDATIONS, f"run.init_from={source}", "outer.iterations=1")
    with pytest.raises(RunError, match=r"run\.init_from: .* in the folder, None now"):
        run(tmp_path, *AT_VALIDATIONS, "outer.iterations=1", "run.resume=true")


def test_run_from_before_init_from_can_be_resumed(source: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "run"))
    path = folder / "config.yaml"
    assert "  init_from: null\n" in path.read_text()
    path.write_text(path.read_text().replace("  init_from: null\n", "  accept: []\n"))
    run(folder, *AT_VALIDATIONS, "run.resume=true")
