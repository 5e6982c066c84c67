"""An interrupted run resumes as if nothing had happened, and never mixes with another run."""

from __future__ import annotations

import random
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from metalearn.config.run_config import resolve_resume
from metalearn.config.run_folder import folder_lock, is_locked
from metalearn.config.schema import TrainConfig
from metalearn.core import serialization as files
from metalearn.core.errors import ConfigError, RunError, RunExistsError
from metalearn.training import checkpoints, trainer
from metalearn.training.checkpoints import best_path, state_paths
from metalearn.training.experiment import Experiment, build_experiment
from metalearn.training.state import TrainState, seed_all
from metalearn.training.tracking.event_files import read_scalars
from tests.faults.processes import load_state
from tests.faults.runs import assert_steps_increase, metrics_without_times, tensors_to_bytes
from tests.training.run_folders import SMALL, run, run_interrupted, train_config

FORTY = [
    *SMALL,
    "outer.iterations=40",
    "eval.every=10",
    "eval.validation_episodes=8",
    "eval.episodes=12",
    "log.every=5",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(folder, *FORTY)
    return folder


@pytest.mark.parametrize("iteration", [3, 27, 39])
def test_resumed_run_is_bitwise_equal(iteration: int, whole: Path, tmp_path: Path) -> None:
    run_interrupted(tmp_path, iteration, *FORTY)
    run(tmp_path, *FORTY, "run.resume=auto")
    assert metrics_without_times(tmp_path) == metrics_without_times(whole)
    assert tensors_to_bytes(load_state(tmp_path)["state"]) == tensors_to_bytes(load_state(whole)["state"])


@pytest.mark.gpu
def test_run_resumes_on_a_gpu(tmp_path: Path) -> None:
    run_interrupted(tmp_path, 27, *FORTY, "run.device=cuda")
    assert run(tmp_path, *FORTY, "run.device=cuda", "run.resume=true")["iterations"] == 40


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
    seed_all(2**40 + 3)
    expected = draw_from_every_generator()
    seed_all(2**40 + 3)
    assert draw_from_every_generator() == expected
    seed_all(4)
    assert not set(draw_from_every_generator()) & set(expected)


@pytest.mark.parametrize(
    ("module", "name", "call"),
    [
        (trainer, "write_metrics", 1),  # after the test was logged
        (checkpoints, "save_best", 1),  # after the state, before the best parameters
        (checkpoints, "save_state", 2),  # after a validation was logged
        (checkpoints, "save_state", 4),
    ],
)
def test_power_cut_between_two_writes_loses_nothing(
    module: ModuleType, name: str, call: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls = getattr(module, name), []

    def fail(*args: Any, **kwargs: Any) -> None:
        calls.append(name)
        if len(calls) == call:
            raise SystemExit("power")
        write(*args, **kwargs)

    monkeypatch.setattr(module, name, fail)
    with pytest.raises(SystemExit):
        run(tmp_path, *FORTY)
    run(tmp_path, *FORTY, "run.resume=true")
    assert metrics_without_times(tmp_path) == metrics_without_times(whole)
    assert_steps_increase(tmp_path)
    assert tensors_to_bytes(files.load_checked(best_path(tmp_path))["params"]) == tensors_to_bytes(
        load_state(tmp_path)["state"]["best"][2]
    )


def test_missing_best_parameters_are_written_on_resume(tmp_path: Path) -> None:
    """Killed in the test, so that nothing is saved any more, before the best parameters were written."""

    def fail(*args: object) -> None:
        raise SystemExit("power")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "save_best", lambda best, run_dir: None)
        patch.setattr(trainer, "write_metrics", fail)
        with pytest.raises(SystemExit):
            run(tmp_path, *FORTY)
    assert not best_path(tmp_path).exists()
    run(tmp_path, *FORTY, "run.resume=true")
    assert files.load_checked(best_path(tmp_path))["iteration"] == load_state(tmp_path)["state"]["best"][0]


def test_resumed_curves_have_no_repeated_points(whole: Path, tmp_path: Path) -> None:
    run_interrupted(tmp_path, 27, *FORTY)
    run(tmp_path, *FORTY, "run.resume=true")
    ours, theirs = read_scalars(tmp_path), read_scalars(whole)
    assert set(ours) == set(theirs)
    for tag, points in theirs.items():
        assert [p.step for p in ours[tag]] == [p.step for p in points], tag
    assert [p.value for p in ours["train/query_loss"]] == [p.value for p in theirs["train/query_loss"]]
    seconds = [p.value for p in ours["time/training_s"]]
    assert seconds == sorted(seconds), "the seconds of both processes, added up"


def test_total_time_includes_earlier_processes(tmp_path: Path) -> None:
    run_interrupted(tmp_path, 27, *FORTY)
    (path, *_) = state_paths(tmp_path)
    content = files.load_checked(path)
    files.save_checked({**content, "total_s": content["total_s"] + 1000}, path)
    assert run(tmp_path, *FORTY, "run.resume=true")["time.total_s"] > 1000


def test_finished_run_is_not_changed(whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.name != ".lock"}
    run(whole, *FORTY, "run.resume=auto")
    assert before == {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.name != ".lock"}


def test_changed_configuration_raises_with_keys_and_remedy(whole: Path) -> None:
    with pytest.raises(
        RunError,
        match=r"(?s)inner\.lr: 0\.4 in the folder, 0\.2 now.*task\.shots: 1 in the folder.*run\.init_from=",
    ):
        run(whole, *FORTY, "run.resume=true", "inner.lr=0.2", "task.shots=2")


def test_run_that_another_process_started_meanwhile_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build_while_another_starts(config: TrainConfig) -> Experiment:
        monkeypatch.setattr(trainer, "build_experiment", build_experiment)
        run_interrupted(tmp_path, 15, *FORTY, "inner.lr=0.1")
        return build_experiment(config)

    monkeypatch.setattr(trainer, "build_experiment", build_while_another_starts)
    with pytest.raises(RunError, match=r"inner\.lr: 0\.1 in the folder, 0\.4 now"):
        run(tmp_path, *FORTY, "run.resume=auto")


def test_resume_raises_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"holds no run to resume.*run\.resume=auto"):
        run(tmp_path / "none", *FORTY, "run.resume=true")
    assert not (tmp_path / "none").exists()


def test_folder_with_a_run_raises_without_resume(whole: Path) -> None:
    with pytest.raises(RunExistsError, match=r"config\.yaml"):
        run(whole, *FORTY)


def test_resolved_engine_is_kept_on_resume(tmp_path: Path) -> None:
    run_interrupted(tmp_path, 15, *FORTY, "inner.engine=checkpoint", "inner.task_chunk=2")
    inner = resolve_resume(train_config(*FORTY, "inner.engine=auto", "run.resume=auto"), tmp_path).inner
    assert (inner.engine, inner.task_chunk) == ("checkpoint", 2)


def test_folder_lock_admits_one_process(tmp_path: Path) -> None:
    assert not is_locked(tmp_path)
    with folder_lock(tmp_path, wait=False):
        assert is_locked(tmp_path)
        with pytest.raises(RunError, match="another process is at work"), folder_lock(tmp_path, wait=False):
            pass
    assert not is_locked(tmp_path)


@pytest.mark.parametrize("value", ["maybe", "1", "null"])
def test_resume_must_be_true_false_or_auto(value: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.resume=.*: must be one of false, true, auto"):
        train_config(f"run.resume={value}")
