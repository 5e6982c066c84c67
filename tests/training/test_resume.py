"""An interrupted run goes on as if nothing had happened, and never with what belongs to another run."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from metalearn.config.compose import compose, to_dataclass
from metalearn.config.run_config import resolve_data, resolve_resume
from metalearn.config.run_folder import folder_lock, is_locked
from metalearn.config.schema import TrainConfig
from metalearn.core import serialization as files
from metalearn.core.errors import RunError, RunExistsError
from metalearn.data import metadata as catalog
from metalearn.training import loop as outer_loop
from metalearn.training import saver
from metalearn.training import trainer as training
from metalearn.training.checkpoints import best_path, state_paths
from metalearn.training.experiment import Experiment, build_experiment
from metalearn.training.random_state import seed_all
from metalearn.training.session import TrainContext
from metalearn.training.state import TrainState
from metalearn.training.tracking.event_files import read_scalars
from metalearn.training.trainer import train
from tests.faults.processes import state_of
from tests.faults.runs import assert_curves, bits, timeless

SMALL = [
    "data=glyphs",
    "data.classes=50",
    "model.width=8",
    "task.meta_batch=4",
    "outer.iterations=40",
    "eval.every=10",
    "eval.validation_episodes=8",
    "eval.episodes=12",
    "log.every=5",
]


@pytest.fixture(autouse=True)
def _no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "_reachable", lambda: False)


def run(folder: Path, *overrides: str) -> None:
    config = to_dataclass(compose("train", [*SMALL, *overrides]), TrainConfig)
    train(resolve_resume(resolve_data(config), folder), folder)


def stop_at(iteration: int, patch: pytest.MonkeyPatch) -> None:
    """As if the power went, before that meta-step."""
    step = outer_loop.meta_step

    def stopped(session: TrainContext, state: TrainState) -> bool:
        if state.iteration == iteration:
            raise SystemExit("power")
        return step(session, state)

    patch.setattr(outer_loop, "meta_step", stopped)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(folder)
    return folder


@pytest.mark.parametrize("iteration", [3, 27, 39])
def test_resumed_is_bitwise_the_same(iteration: int, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop_at(iteration, patch)
        with pytest.raises(SystemExit):
            run(folder)
    assert not (folder / "metrics.json").exists()
    run(folder, "run.resume=auto")
    assert timeless(folder) == timeless(whole)
    assert bits(state_of(folder)["state"]) == bits(state_of(whole)["state"])


@pytest.mark.gpu
def test_resumed_on_a_gpu(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_at(27, patch)
        with pytest.raises(SystemExit):
            run(tmp_path, "run.device=cuda")
    run(tmp_path, "run.device=cuda", "run.resume=true")
    assert timeless(tmp_path)["iterations"] == 40


def draws() -> list[float]:
    """From every generator."""
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), *torch.rand(3).tolist()]


def test_random_draws_go_on_where_they_were() -> None:
    outer = to_dataclass(compose("train"), TrainConfig).outer
    draws()  # an odd number of normal ones: half of a pair waits in the state
    content = TrainState.start({"w": torch.ones(2)}, outer).content()
    expected = draws()
    TrainState.start({"w": torch.zeros(2)}, outer).restore(content)
    assert draws() == expected


def test_a_seed_starts_every_generator() -> None:
    seed_all(2**40 + 3)
    expected = draws()
    seed_all(2**40 + 3)
    assert draws() == expected
    seed_all(4)
    assert not set(draws()) & set(expected)


@pytest.mark.parametrize(
    ("module", "name", "call"),
    [(training, "write_metrics", 1), (saver, "save_best", 1), (saver, "save_state", 2), (saver, "save_state", 4)],
)
def test_power_that_goes_between_two_writings(
    module: ModuleType, name: str, call: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the test was shown, after the state but before the best parameters, after a validation was shown."""
    real, calls = getattr(module, name), []

    def power_goes(*args: Any, **more: Any) -> None:
        calls.append(name)
        if len(calls) == call:
            raise SystemExit("power")
        real(*args, **more)

    monkeypatch.setattr(module, name, power_goes)
    with pytest.raises(SystemExit):
        run(tmp_path)
    run(tmp_path, "run.resume=true")
    assert timeless(tmp_path) == timeless(whole)
    assert_curves(tmp_path)
    assert bits(files.load_checked(best_path(tmp_path))["params"]) == bits(state_of(tmp_path)["state"]["best"][2])


def test_best_parameters_that_were_not_written_are_on_the_way_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the test, so that nothing is saved any more, before the best parameters were written."""
    monkeypatch.setattr(saver, "save_best", lambda best, run_dir: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "write_metrics", stop)
        with pytest.raises(SystemExit):
            run(tmp_path)
    assert not best_path(tmp_path).exists()
    run(tmp_path, "run.resume=true")
    assert files.load_checked(best_path(tmp_path))["iteration"] == state_of(tmp_path)["state"]["best"][0]


def stop(*args: object) -> None:
    raise SystemExit("power")


def test_curves_go_on_without_doubled_points(whole: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_at(27, patch)
        with pytest.raises(SystemExit):
            run(tmp_path)
    run(tmp_path, "run.resume=true")
    ours, theirs = read_scalars(tmp_path), read_scalars(whole)
    assert set(ours) == set(theirs)
    for tag, points in theirs.items():
        assert [p.step for p in ours[tag]] == [p.step for p in points], tag
    assert [p.value for p in ours["train/query_loss"]] == [p.value for p in theirs["train/query_loss"]]
    seconds = [p.value for p in ours["time/training_s"]]
    assert seconds == sorted(seconds), "the seconds of both processes, added up"


def test_time_of_all_processes_counts(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_at(27, patch)
        with pytest.raises(SystemExit):
            run(tmp_path)
    (path, *_) = state_paths(tmp_path)
    content = files.load_checked(path)
    files.save_checked({**content, "total_s": content["total_s"] + 1000}, path)
    run(tmp_path, "run.resume=true")
    assert json.loads((tmp_path / "metrics.json").read_text())["time.total_s"] > 1000


def test_finished_run_is_left_alone(whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.name != ".lock"}
    run(whole, "run.resume=auto")
    assert before == {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.name != ".lock"}


def test_another_configuration_is_refused_by_key(whole: Path) -> None:
    with pytest.raises(RunError, match=r"(?s)inner\.lr: 0\.4 in the folder, 0\.2 now.*task\.shots: 1 in the folder"):
        run(whole, "run.resume=true", "inner.lr=0.2", "task.shots=2")


def test_another_process_that_began_the_run_meanwhile_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build_while_another_begins(config: TrainConfig) -> Experiment:
        monkeypatch.setattr(training, "build_experiment", build_experiment)
        with pytest.MonkeyPatch.context() as patch:
            stop_at(15, patch)
            with pytest.raises(SystemExit):
                run(tmp_path, "inner.lr=0.1")
        return build_experiment(config)

    monkeypatch.setattr(training, "build_experiment", build_while_another_begins)
    with pytest.raises(RunError, match=r"inner\.lr: 0\.1 in the folder, 0\.4 now"):
        run(tmp_path, "run.resume=auto")


def test_nothing_to_go_on_with(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"holds no run to resume.*run\.resume=auto"):
        run(tmp_path / "none", "run.resume=true")
    assert not (tmp_path / "none").exists()


def test_without_resume_a_folder_is_taken(whole: Path) -> None:
    with pytest.raises(RunExistsError, match=r"config\.yaml"):
        run(whole)


def test_settled_engine_stays(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_at(15, patch)
        with pytest.raises(SystemExit):
            run(tmp_path, "inner.engine=checkpoint", "inner.task_chunk=2")
    config = to_dataclass(compose("train", [*SMALL, "inner.engine=auto", "run.resume=auto"]), TrainConfig)
    kept = resolve_resume(config, tmp_path).inner
    assert (kept.engine, kept.task_chunk) == ("checkpoint", 2)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    assert not is_locked(tmp_path)
    with folder_lock(tmp_path, wait=False):
        assert is_locked(tmp_path)
        with pytest.raises(RunError, match="another process is at work"), folder_lock(tmp_path, wait=False):
            pass
    assert not is_locked(tmp_path)


@pytest.mark.parametrize("value", ["maybe", "1", "null"])
def test_resume_is_true_false_or_auto(value: str) -> None:
    from metalearn.config.validation import validate_train_config
    from metalearn.core.errors import ConfigError

    with pytest.raises(ConfigError, match=r"run\.resume=.*: must be one of false, true, auto"):
        validate_train_config(to_dataclass(compose("train", [f"run.resume={value}"]), TrainConfig))
