"""Failures: non-finite numbers stop the training or are skipped; out-of-memory errors are explained."""

from __future__ import annotations

import errno
import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from metalearn.config.schema import TrainConfig
from metalearn.core.errors import DataError, NonFiniteError, NonFiniteLossError, RemoteNonFiniteError, RunError
from metalearn.core.types import Episodes, Params
from metalearn.metagrad import meta_gradient
from metalearn.training import failures, loop, step
from metalearn.training.auto_engine import first_meta_step
from metalearn.training.checkpoints import best_path, state_paths
from metalearn.training.experiment import Experiment, build_experiment
from metalearn.training.failures import (
    FOLDER,
    MAX_DUMPS,
    _estimate_mib,
    explain_out_of_memory,
    locate_nonfinite_gradient,
    replay_episode,
)
from metalearn.training.runtime.distributed import DistributedContext
from metalearn.training.state import TrainState
from metalearn.training.step import MetaUpdate, compute_meta_update, local_tasks
from metalearn.training.tracking.event_files import read_scalars
from metalearn.training.tracking.meter import Meter
from metalearn.training.trainer import train
from tests.config.factories import train_config
from tests.faults.processes import load_state, read_output, start_training, wait_for_exit
from tests.faults.runs import RUN, SMALL_RUN, assert_runs_equal, metrics_without_times, resume
from tests.training.run_folders import AT_VALIDATIONS


def config(*more: str) -> TrainConfig:
    return train_config(*AT_VALIDATIONS, *more)


def poison(at: range, patch: pytest.MonkeyPatch) -> None:
    def poisoned(experiment: Experiment, iteration: int, ranks: DistributedContext) -> Episodes:
        episodes = local_tasks(experiment, iteration, ranks)
        if iteration in at:
            episodes.query_x[1, 0] = math.nan
        return episodes

    patch.setattr(loop, "local_tasks", poisoned)


def test_skipped_meta_steps_are_counted_and_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    poison(range(3, 8), monkeypatch)
    train(config("run.on_nonfinite=skip"), tmp_path)
    assert metrics_without_times(tmp_path)["iterations.skipped"] == 5
    assert metrics_without_times(tmp_path)["iterations"] == 24
    curves = read_scalars(tmp_path)
    assert {(p.step, p.value) for p in curves["optimizer/skipped"]} >= {(6, 3.0), *((n, 5.0) for n in range(9, 25, 3))}
    steps = [p.step for p in curves["loss/query"]]
    assert steps == [1, 3, 9, 12, 15, 16, 18, 21, 24], "a window of skipped meta-steps logs nothing"
    assert [p.step for p in curves["accuracy/validation"]] == [8, 16, 24], "also after a skipped meta-step"
    assert "Meta-step 4 is skipped: the query loss of task 1 is nan" in caplog.text
    assert sorted(p.name for p in (tmp_path / FOLDER).glob("*.pt")) == [f"meta-step-{n:08}.pt" for n in range(4, 9)]
    assert load_state(tmp_path)["state"]["optimizer"]["state"][0]["step"] == 19


def test_nonfinite_diagnostics_do_not_stop_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    poison(range(5, 6), monkeypatch)
    train(config("run.on_nonfinite=skip", "log.curvature_every=3", "log.eigenvalue_every=6"), tmp_path)
    assert "No second-order metrics at meta-step 6" in caplog.text
    cosines = [p.step for p in read_scalars(tmp_path)["gradients/cosine_first_vs_second"]]
    assert cosines == [1, *(n for n in range(3, 25, 3) if n != 6)]


def fail_slowly() -> None:
    time.sleep(0.5)
    raise RuntimeError


def test_failed_meta_step_does_not_count_as_time() -> None:
    meter = Meter(torch.device("cpu"))
    meter.peak_bytes = 1  # measured before
    with pytest.raises(RuntimeError), meter.time_step():
        fail_slowly()
    with meter.checkpoint():
        assert meter.state_dict()["window"]["passed_s"] < 0.25


def test_diverged_state_is_not_saved_and_a_full_disk_does_not_hide_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **more: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    poison(range(13, 14), monkeypatch)
    monkeypatch.setattr(loop, "dump_episode", full)
    message = r"diverged at meta-step 14: the query loss of task 1.*checkpoint of meta-step 8 is kept"
    with pytest.raises(RunError, match=message):
        train(config(), tmp_path)
    assert [path.name for path in state_paths(tmp_path)] == ["state-00000008.pt"]


def test_replay_episode_raises_for_another_file(finished: Path) -> None:
    with pytest.raises(RunError, match=r"best\.pt is not a saved episode"):
        replay_episode(best_path(finished))


def test_locate_nonfinite_gradient_names_the_task_or_the_parameter() -> None:
    experiment = build_experiment(config())
    episodes = experiment.train.tasks(0, 3)

    def locate(grads: Params, *, single_process: bool = True) -> NonFiniteError:
        state = TrainState.create(experiment.theta, experiment.config.outer)
        return locate_nonfinite_gradient(experiment, state, episodes, grads, single_process=single_process)

    overflow = {"small": torch.ones(2), "large": torch.full((1,), 3e19)}
    assert "the meta-gradient is " in str(locate(overflow))
    assert "'large'" in str(locate(overflow))
    assert isinstance(locate(overflow, single_process=False), RemoteNonFiniteError)
    episodes.query_x[2].fill_(math.nan)  # a loss that was not checked
    error = locate({"w": torch.tensor([math.nan])})
    assert isinstance(error, NonFiniteLossError)
    assert error.task == 2


def test_too_many_skips_in_a_row_stop_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(range(2, 1000), monkeypatch)
    monkeypatch.setattr(loop, "MAX_CONSECUTIVE_SKIPS", 25)
    with pytest.raises(RunError, match=r"at meta-step 28: 25 meta-steps in a row were skipped"):
        train(config("run.on_nonfinite=skip", "outer.iterations=100", "eval.every=100"), tmp_path)
    assert len(list((tmp_path / FOLDER).glob("*.pt"))) == MAX_DUMPS


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:116] err == 0. DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_out_of_memory_names_the_estimate_and_the_keys(error: Exception) -> None:
    experiment = build_experiment(config("inner.steps=5"))
    explained = explain_out_of_memory(error, experiment)
    words = ["inner.engine=unroll, 3 of 3 tasks at a time", "MiB are free now", "  inner.engine=adjoint   about"]
    for text in (*words, "  inner.task_chunk=1   about", "inner.engine=auto"):
        assert text in str(explained)


def test_memory_estimate_equals_a_measured_meta_step() -> None:
    experiment = build_experiment(config("inner.steps=3", "task.meta_batch=8"))
    problem = first_meta_step(experiment)
    measured = problem.peak(experiment.inner, 2**62) / 2**20
    assert _estimate_mib(problem, experiment.inner, 8) == pytest.approx(measured, rel=0.05)


def fail_at(iteration: int, fail: Callable[[], object]) -> None:
    """Have a meta-step of this process fail."""

    def fail_or_compute(experiment: Experiment, state: TrainState, *args: Any, **more: Any) -> MetaUpdate:
        if state.iteration == iteration:
            fail()
        return compute_meta_update(experiment, state, *args, **more)

    pytest.MonkeyPatch().setattr(loop, "compute_meta_update", fail_or_compute)


@pytest.mark.parametrize("again", [None, MemoryError(), SystemExit("killed")], ids=["once", "again", "killed"])
def test_out_of_memory_in_a_meta_step_saves_the_state(
    again: BaseException | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explain(*args: Any) -> str:
        assert load_state(tmp_path)["state"]["iteration"] == 11
        raise again or AssertionError

    with monkeypatch.context() as patch:
        patch.setattr(loop, "compute_meta_update", compute_meta_update)  # so that it is restored
        fail_at(11, lambda: torch.empty(2**60))
        if again:
            patch.setattr(failures, "_out_of_memory_message", explain)
        with pytest.raises(BaseException, match=r"(?s)Out of memory.*task_chunk=1.*step 11 is kept|killed") as raised:
            train(config(), tmp_path)
    assert raised.value.__context__ is None, "its trace would keep the activations"
    assert isinstance(raised.value, SystemExit if isinstance(again, SystemExit) else RunError)
    assert load_state(tmp_path)["state"]["iteration"] == 11


def raise_error(kind: type[Exception], *args: object) -> None:
    raise kind(*args)


@pytest.mark.parametrize(
    ("kind", "args", "says"),
    [
        (ValueError, ("of the user's model",), "ValueError: of the user's model"),
        (DataError, ("photo.png is damaged.",), "DataError: photo.png is damaged."),
        (OSError, (errno.ESTALE, "Stale file handle", "photo.png"), "photo.png"),
        (SystemExit, (3,), "SystemExit ends the training (3)"),
    ],
    ids=["ValueError", "DataError", "OSError", "SystemExit"],
)
def test_error_of_another_kind(
    kind: type[Exception], args: tuple[object, ...], says: str, tmp_path: Path, uninterrupted_run: Path
) -> None:
    process = start_training(
        [*SMALL_RUN, "run.checkpoint_every_s=null"],
        tmp_path,
        before=fail_at,
        args=(11, functools.partial(raise_error, kind, *args)),
    )
    assert wait_for_exit(process) == {ValueError: 1, DataError: 2, OSError: 1, SystemExit: 3}[kind]
    said = " ".join(read_output(tmp_path).split())
    assert says in said
    assert "checkpoint of meta-step 11 is kept" in said
    assert "run.resume=true" in said
    assert load_state(tmp_path / RUN)["state"]["iteration"] == 11
    assert_runs_equal(resume(tmp_path), uninterrupted_run)


def test_inconsistent_state_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tear(state: TrainState, *args: Any, **more: Any) -> None:
        state.is_consistent = False
        raise MemoryError

    monkeypatch.setattr(loop, "apply_meta_update", tear)
    with pytest.raises(RunError, match="Out of memory"):
        train(config(), tmp_path)
    assert not list((tmp_path / "checkpoints").glob("*"))


@pytest.fixture
def deferred(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check losses once a meta-step, as on a GPU."""
    monkeypatch.setattr(step, "defers_loss_checks", lambda device: True)


def first_update(
    experiment: Experiment, *, spoil: str | None = None, ranks: DistributedContext | None = None
) -> MetaUpdate:
    state = TrainState.create(experiment.theta, experiment.config.outer)
    ranks = ranks or DistributedContext()
    episodes = local_tasks(experiment, 0, ranks)
    if spoil:
        getattr(episodes, spoil)[1, 0] = math.nan
    return compute_meta_update(experiment, state, episodes, ranks)


@pytest.mark.parametrize(("kind", "steps"), [("query", 1), ("support", 0)])
def test_deferred_check_names_the_loss(kind: str, steps: int, deferred: None) -> None:
    experiment = build_experiment(config(f"inner.steps={2 if kind == 'support' else 1}"))
    message = f"the {kind} loss of task 1 is nan after {steps} inner step{'s' * (steps != 1)}"
    with pytest.raises(NonFiniteLossError, match=message) as raised:
        first_update(experiment, spoil=f"{kind}_x")
    assert raised.value.task == 1


def test_deferred_checks_give_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(range(3, 6), monkeypatch)
    settings = config("run.on_nonfinite=skip", "outer.clip_norm=1", "outer.iterations=8")
    train(settings, tmp_path / "at once")
    monkeypatch.setattr(step, "defers_loss_checks", lambda device: True)
    train(settings, tmp_path / "deferred")
    assert_runs_equal(tmp_path / "deferred", tmp_path / "at once")
    assert len(list((tmp_path / "deferred" / FOLDER).glob("*.pt"))) == 3


class ReadBacks(TorchDispatchMode):
    """Counts operations that sync the CPU with the device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # not annotated in torch
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("second_order", "inner"), [("true", "unroll"), ("false", "adjoint")])
def test_one_sync_per_meta_step(second_order: str, inner: str, deferred: None, monkeypatch: pytest.MonkeyPatch) -> None:
    lists = []
    to_list = Tensor.tolist

    def tolist(self: Tensor) -> Any:
        lists.append(self.shape)
        return to_list(self)

    experiment = build_experiment(config(f"inner.second_order={second_order}", f"inner.engine={inner}"))
    monkeypatch.setattr(Tensor, "tolist", tolist)
    with ReadBacks() as reads:
        first_update(experiment)
    assert (lists, reads.count) == ([(3,)], 0)


@dataclass(frozen=True)
class TwoProcesses(DistributedContext):
    """The first of two processes; the other has the same values, and flags of its own."""

    other_flags: tuple[float, float] = (0.0, 0.0)

    def all_reduce_sum(self, tensors: Any) -> list[Tensor]:
        *values, flags = tensors
        return [*(2 * v for v in values), flags + torch.tensor(self.other_flags)]


def test_failure_of_another_process_is_known_to_all(deferred: None, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = build_experiment(config("task.meta_batch=4"))
    assert not first_update(experiment, ranks=TwoProcesses(0, 2)).stop_requested
    assert first_update(experiment, ranks=TwoProcesses(0, 2, (0.0, 1.0))).stop_requested
    failed = TwoProcesses(0, 2, (1.0, 1.0))
    with pytest.raises(RemoteNonFiniteError) as raised:
        first_update(experiment, ranks=failed)
    assert raised.value.stop_requested
    with pytest.raises(NonFiniteLossError, match="the query loss of task 1 is nan"):
        first_update(experiment, spoil="query_x", ranks=failed)


def test_mean_that_overflows_is_an_error(deferred: None, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = build_experiment(config())

    def overflowing(params: Any, episodes: Episodes, iteration: int) -> Any:
        result = meta_gradient(experiment.forward, params, episodes, experiment.inner)
        result.loss.fill_(math.inf)
        return result

    experiment.__dict__["meta_gradient"] = overflowing
    with pytest.raises(NonFiniteError, match=r"a mean of the tasks' losses was NaN or infinite") as raised:
        first_update(experiment)
    assert raised.value.task is None
