"""An interrupted run resumes as if nothing had happened; a new run may start from another's best parameters."""

from __future__ import annotations

import logging
import os
import random
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from metalearn.config.run_config import load_run_config
from metalearn.config.schema import TrainConfig
from metalearn.core import serialization as files
from metalearn.core.errors import RunError
from metalearn.core.types import Episodes
from metalearn.training import checkpoints, loop, trainer
from metalearn.training.checkpoints import best_path, state_paths
from metalearn.training.experiment import Experiment, build_experiment
from metalearn.training.run_folder import folder_lock, is_locked
from metalearn.training.runtime.distributed import DistributedContext
from metalearn.training.state import TrainState, seed_all
from metalearn.training.step import local_tasks
from metalearn.training.tracking.event_files import read_scalars
from tests.config.factories import train_config
from tests.faults.runs import SMALL as MLP_RUN
from tests.faults.runs import STEPS, assert_runs_equal, assert_steps_increase, metrics_without_times
from tests.training.run_folders import AT_VALIDATIONS, SMALL, PowerCut, run, run_interrupted


def modified(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}


@pytest.mark.parametrize("iteration", [3, 13, 23])
def test_resumed_run_is_bitwise_equal(iteration: int, finished: Path, tmp_path: Path) -> None:
    run_interrupted(tmp_path, iteration, *AT_VALIDATIONS)
    run(tmp_path, *AT_VALIDATIONS, "run.resume=auto")
    assert_runs_equal(tmp_path, finished)
    ours, theirs = read_scalars(tmp_path), read_scalars(finished)
    assert {tag: [p.step for p in ours[tag]] for tag in ours} == {tag: [p.step for p in theirs[tag]] for tag in theirs}
    seconds = [p.value for p in ours["cost/training_s"]]
    assert seconds == sorted(seconds), "the seconds of both processes, added up"


@pytest.mark.gpu
def test_run_resumes_on_a_gpu(tmp_path: Path) -> None:
    overrides = [*SMALL, "outer.iterations=24", "eval.every=8", "run.device=cuda"]
    run_interrupted(tmp_path, 13, *overrides)
    assert run(tmp_path, *overrides, "run.resume=true")["iterations"] == 24


def draw_from_every_generator() -> list[float]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), *torch.rand(3).tolist()]


def test_state_restores_every_generator() -> None:
    outer = train_config("data=glyphs").outer
    draw_from_every_generator()  # an odd number of normal ones: half of a pair waits in the state
    content = TrainState.create({"w": torch.ones(2)}, outer).state_dict()
    expected = draw_from_every_generator()
    TrainState.create({"w": torch.zeros(2)}, outer).load_state_dict(content)
    assert draw_from_every_generator() == expected


def test_seed_all_seeds_every_generator() -> None:
    draws = []
    for seed in (2**40 + 3, 2**40 + 3, 4):
        seed_all(seed)
        draws.append(draw_from_every_generator())
    assert draws[0] == draws[1]
    assert not set(draws[0]) & set(draws[2])


@pytest.mark.parametrize(
    ("module", "name", "call"),
    [
        (trainer, "write_metrics", 1),  # after the test was logged
        (checkpoints, "save_best", 1),  # after the state, before the best parameters
        (checkpoints, "save_state", 2),  # after a validation was logged
        (checkpoints, "save_state", 3),
    ],
)
def test_power_cut_between_two_writes_loses_nothing(
    module: ModuleType, name: str, call: int, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls = getattr(module, name), []

    def fail(*args: Any, **kwargs: Any) -> None:
        calls.append(name)
        if len(calls) == call:
            raise PowerCut
        write(*args, **kwargs)

    monkeypatch.setattr(module, name, fail)
    with pytest.raises(PowerCut):
        run(tmp_path, *AT_VALIDATIONS)
    files.remove(best_path(tmp_path))  # as if it had not been written either
    run(tmp_path, *AT_VALIDATIONS, "run.resume=true")
    assert_runs_equal(tmp_path, finished)


def test_total_time_includes_earlier_processes(tmp_path: Path) -> None:
    run_interrupted(tmp_path, 13, *AT_VALIDATIONS)
    (path, *_) = state_paths(tmp_path)
    content = files.load_checked(path)
    files.save_checked({**content, "total_s": content["total_s"] + 1000}, path)
    assert run(tmp_path, *AT_VALIDATIONS, "run.resume=true")["time.total_s"] > 1000


def test_finished_run_is_not_changed(finished: Path) -> None:
    before = modified(finished)
    # the keys that change no result may differ
    run(finished, *AT_VALIDATIONS, "run.resume=auto", "run.on_nonfinite=skip", "run.checkpoint_every_s=5")
    assert before == modified(finished)


def test_run_that_another_process_started_meanwhile_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build_while_another_starts(config: TrainConfig) -> Experiment:
        monkeypatch.setattr(trainer, "build_experiment", build_experiment)
        run_interrupted(tmp_path, 9, *AT_VALIDATIONS, "inner.lr=0.1")
        return build_experiment(config)

    monkeypatch.setattr(trainer, "build_experiment", build_while_another_starts)
    with pytest.raises(RunError, match=r"inner\.lr: 0\.1 in the folder, 0\.4 now"):
        run(tmp_path, *AT_VALIDATIONS, "run.resume=auto")


def test_folder_lock_admits_one_process(tmp_path: Path) -> None:
    assert not is_locked(tmp_path)
    with folder_lock(tmp_path, wait=False):
        assert is_locked(tmp_path)
        with pytest.raises(RunError, match="another process is at work"), folder_lock(tmp_path, wait=False):
            pass
    assert not is_locked(tmp_path)


def test_init_from_starts_with_the_best_parameters(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    before = modified(finished)
    metrics = run(tmp_path, *AT_VALIDATIONS, f"run.init_from={finished}", "outer.iterations=32", "outer.lr=1e-3")
    best = metrics_without_times(finished)
    assert metrics["iterations"] == 32
    validations = read_scalars(tmp_path)["accuracy/validation"]
    assert validations[0].value == pytest.approx(best["validation.best_accuracy"]), "on the same tasks"
    assert [point.step for point in validations] == [0, 8, 16, 24, 32]
    assert metrics["validation.best_accuracy"] >= best["validation.best_accuracy"]
    assert f"best parameters of {finished}, those of its meta-step {best['validation.best_iteration']}" in caplog.text
    assert before == modified(finished)
    assert_steps_increase(tmp_path)


def test_init_from_takes_other_data_and_a_relative_path(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run(tmp_path / "run", *AT_VALIDATIONS, f"run.init_from={os.path.relpath(finished)}", "data.jitter=0.2")
    assert Path(load_run_config(tmp_path / "run" / "config.yaml").run.init_from or "").is_absolute()


def test_init_from_raises_when_shapes_differ_and_leaves_the_folder_free(finished: Path, tmp_path: Path) -> None:
    message = r"run\.init_from=.*the checkpoint does not fit the model: parameter '.*' is \(8.*and \(9"
    with pytest.raises(RunError, match=message):
        run(tmp_path, *AT_VALIDATIONS, f"run.init_from={finished}", "model.hidden=[9]")
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


def test_resume_of_a_run_with_init_from_is_bitwise_equal(finished: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(finished, tmp_path / "source"))
    overrides = [*AT_VALIDATIONS, f"run.init_from={source}"]
    run(tmp_path / "whole", *overrides)
    for iteration in (0, 5, 20):
        run_interrupted(tmp_path / str(iteration), iteration, *overrides)
    run_interrupted(tmp_path / "early", 0, *overrides)
    shutil.rmtree(tmp_path / "early" / "checkpoints")  # before its first checkpoint it starts from the source again
    for name in ("early", "0", "5", "20"):
        run(tmp_path / name, *overrides, "run.resume=true")
        assert_runs_equal(tmp_path / name, tmp_path / "whole")
        shutil.rmtree(source, ignore_errors=True)  # later the source is no longer needed


def test_run_from_before_init_from_can_be_resumed(finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    text = (folder / "config.yaml").read_text()
    assert "  init_from: null\n" in text
    (folder / "config.yaml").write_text(text.replace("  init_from: null\n", "  accept: []\n"))
    run(folder, *AT_VALIDATIONS, "run.resume=true")


def test_folder_that_was_removed_can_be_resumed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"

    def remove(experiment: Experiment, at: int, ranks: DistributedContext) -> Episodes:
        if at == 3:
            shutil.rmtree(folder)
        if at == 9:
            raise PowerCut
        return local_tasks(experiment, at, ranks)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "local_tasks", remove)
        with pytest.raises(PowerCut):
            run(folder, *MLP_RUN)
    assert "config.yaml is gone; it is written again" in caplog.text
    assert run(folder, *MLP_RUN, "run.resume=true")["iterations"] == STEPS
