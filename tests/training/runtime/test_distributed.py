"""Several processes share a batch's tasks, and compute what one would."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from metalearn.config.compose import compose, to_dataclass
from metalearn.config.schema import TrainConfig
from metalearn.core import serialization as files
from metalearn.core.errors import RunError
from metalearn.core.types import Episodes
from metalearn.training import loop as outer_loop
from metalearn.training.experiment import Experiment
from metalearn.training.runtime.distributed import DistributedContext
from metalearn.training.session import TrainContext
from metalearn.training.state import TrainState
from metalearn.training.step import local_tasks
from metalearn.training.trainer import check_same_config
from tests.conftest import REPO
from tests.faults.processes import finished, output, start, state_of
from tests.faults.runs import RUN, SMALL, assert_curves, timeless, whole


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_every_task_is_one_processs(size: int) -> None:
    for count in (7, 8, 16):
        shares = [DistributedContext(rank, size).share(count) for rank in range(size)]
        assert [task for share in shares for task in share] == list(range(count))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_alone_nothing_is_sent() -> None:
    alone = DistributedContext()
    tensors = [torch.ones(2), torch.zeros(())]
    assert all(a is b for a, b in zip(alone.sum(tensors), tensors, strict=True))
    assert alone.broadcast("x") == "x"
    assert alone.join(tensors[0]) is tensors[0]


def environment(rank: int, size: int, port: int) -> Mapping[str, str]:
    """As torchrun sets it."""
    return {
        "TORCHELASTIC_RUN_ID": "test",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


LEFT_BEHIND = """
import os
import torch
from metalearn.training.runtime.distributed import joined

with joined(torch.device("cpu")) as ranks:
    import torch._dynamo  # as torch.optim does when an optimiser is first used

    ranks.join(torch.ones(1))
print([name for t in os.listdir("/proc/self/task") if "gloo" in (name := open(f"/proc/self/task/{t}/comm").read())])
"""


def test_no_thread_of_the_group_outlives_it() -> None:
    """One that drops a tensor while Python shuts down ends the process by SIGABRT."""
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", LEFT_BEHIND],
            env={**os.environ, **environment(rank, 2, port), "OMP_NUM_THREADS": "1"},
            cwd=REPO,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    assert [process.communicate(timeout=120)[0].strip() for process in processes] == ["[]", "[]"]
    assert [process.returncode for process in processes] == [0, 0]


def together(
    size: int, folder: Path, *more: str, before: Callable[[], None] | None = None, codes: tuple[int, ...] = ()
) -> Path:
    """A training by several processes; the second and further write their output beside the run."""
    port = free_port()
    processes = [
        start(
            [*SMALL, f"hydra.run.dir={folder / RUN}", *more],
            folder / str(rank),
            environment=environment(rank, size, port),
            before=before if rank == size - 1 else None,
        )
        for rank in range(size)
    ]
    found = tuple(finished(process) for process in processes)
    assert found == (codes or (0,) * size), "\n".join(output(folder / str(rank)) for rank in range(size))
    return folder / RUN


def gradient_of_the_first_step(run_dir: Path) -> dict[int, Tensor]:
    """Adam's first moment after one meta-step is a tenth of the meta-gradient."""
    moments = state_of(run_dir)["state"]["optimizer"]["state"]
    return {i: 10 * m["exp_avg"] for i, m in moments.items()}


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return together(2, tmp_path_factory.mktemp("two"))


def test_the_gradient_is_one_processs(tmp_path: Path) -> None:
    """By two processes of three tasks, so that the shares are uneven, and clipped by the norm of the whole."""
    one_step = ["outer.iterations=1", "eval.every=1", "outer.clip_norm=0.01"]
    alone, shared = together(1, tmp_path / "1", *one_step), together(2, tmp_path / "2", *one_step)
    ours, theirs = gradient_of_the_first_step(shared), gradient_of_the_first_step(alone)
    for i, gradient in theirs.items():
        assert (ours[i] - gradient).norm() <= 1e-5 * gradient.norm()
    assert torch.cat([g.flatten() for g in ours.values()]).norm().item() == pytest.approx(0.01, rel=1e-4)


def test_the_first_process_alone_writes(by_two: Path) -> None:
    assert {p.name for p in (by_two.parent / "1").iterdir()} == {"output.txt"}
    assert output(by_two.parent / "1") == ""
    assert_curves(by_two)
    assert timeless(by_two)["processes"] == 2
    assert timeless(by_two)["iterations"] == 24


def test_one_process_ends_where_two_do(by_two: Path, tmp_path: Path) -> None:
    ours, theirs = state_of(by_two)["state"], state_of(whole(tmp_path))["state"]
    for name, p in theirs["params"].items():
        torch.testing.assert_close(ours["params"][name], p, rtol=1e-3, atol=1e-4)
    assert timeless(by_two)["test.accuracy"] == pytest.approx(timeless(whole(tmp_path))["test.accuracy"])


def be_asked_to_end() -> None:
    """Have this process asked at its fifth meta-step."""
    step = outer_loop.meta_step

    def asked(session: TrainContext, state: TrainState) -> bool:
        if state.iteration == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(session, state)

    pytest.MonkeyPatch().setattr(outer_loop, "meta_step", asked)


def test_all_stop_after_the_same_meta_step(tmp_path: Path) -> None:
    run_dir = together(2, tmp_path, before=be_asked_to_end, codes=(143, 143))
    assert state_of(run_dir)["state"]["iteration"] == 5
    assert "checkpoint of meta-step 5 is kept" in " ".join(output(tmp_path / "0").split())


def save_slowly() -> None:
    """Have this process's saves last, as on a slow disk."""
    save = files.save_checked

    def slow(content: Any, path: Path) -> None:
        time.sleep(0.5)
        save(content, path)

    pytest.MonkeyPatch().setattr(files, "save_checked", slow)


def test_processes_that_are_all_asked_to_end_wait_for_the_first_to_save(tmp_path: Path) -> None:
    """As Slurm and systemd ask; and as torchrun does, that ends the others when one has ended."""
    port = free_port()
    every_60_s = [o for o in SMALL if not o.startswith("run.checkpoint")] + ["run.checkpoint_every_s=60"]
    more = ["outer.iterations=100000", "eval.every=100000", "log.every=1", f"hydra.run.dir={tmp_path / RUN}"]
    first = start([*every_60_s, *more], tmp_path / "0", environment=environment(0, 2, port), before=save_slowly)
    second = start([*every_60_s, *more], tmp_path / "1", environment=environment(1, 2, port))
    until = time.monotonic() + 60
    while sum(p.stat().st_size for p in (tmp_path / RUN).glob("events*")) < 20_000:  # some ten meta-steps
        assert time.monotonic() < until
        time.sleep(0.05)
    for process in (first, second):
        os.kill(process.pid or 0, signal.SIGTERM)
    assert finished(second) == 143, output(tmp_path / "1")
    assert state_of(tmp_path / RUN)["state"]["iteration"] > 0, "it was saved before the second ended"
    assert finished(first) == 143, output(tmp_path / "0")


def be_asked_and_meet_a_nan() -> None:
    """Both, in one meta-step."""
    meet_a_nan()
    own = outer_loop.local_tasks  # type: ignore[attr-defined]

    def asked(experiment: Experiment, iteration: int, ranks: DistributedContext) -> Episodes:
        if iteration == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        episodes: Episodes = own(experiment, iteration, ranks)
        return episodes

    pytest.MonkeyPatch().setattr(outer_loop, "local_tasks", asked)


def test_a_meta_step_that_is_skipped_still_says_who_was_asked_to_end(tmp_path: Path) -> None:
    run_dir = together(2, tmp_path, "run.on_nonfinite=skip", before=be_asked_and_meet_a_nan, codes=(143, 143))
    assert state_of(run_dir)["state"]["iteration"] == 3


def test_processes_with_other_data_are_refused() -> None:
    config = to_dataclass(compose("train", SMALL), TrainConfig)
    check_same_config(config, config, DistributedContext(1, 2))
    auto = dataclasses.replace(config, inner=dataclasses.replace(config.inner, engine="auto"))
    check_same_config(auto, config, DistributedContext(1, 2))
    other = to_dataclass(compose("train", [*SMALL, "data.jitter=0.3"]), TrainConfig)
    with pytest.raises(RunError, match=r"(?s)process 1 would train on something else.*data\.jitter: 0\.3 here"):
        check_same_config(other, config, DistributedContext(1, 2))


def meet_a_nan() -> None:
    """Have this process's tasks be none, at its third meta-step."""

    def poisoned(experiment: Experiment, iteration: int, ranks: DistributedContext) -> Episodes:
        episodes = local_tasks(experiment, iteration, ranks)
        if iteration == 2:
            episodes.query_x[0, 0] = math.nan
        return episodes

    pytest.MonkeyPatch().setattr(outer_loop, "local_tasks", poisoned)


def test_what_one_process_meets_stops_all(tmp_path: Path) -> None:
    run_dir = together(2, tmp_path, before=meet_a_nan, codes=(2, 2))
    assert "another process has found a loss or a gradient" in " ".join(output(tmp_path / "0").split())
    assert "[process 1] DivergedError: Training has diverged at meta-step 3: the query loss of task 1" in output(
        tmp_path / "1"
    )
    assert state_of(run_dir)["state"]["iteration"] == 2


def test_what_one_process_meets_is_skipped_by_all(tmp_path: Path) -> None:
    run_dir = together(2, tmp_path, "run.on_nonfinite=skip", before=meet_a_nan)
    assert timeless(run_dir)["iterations.skipped"] == 1


def test_more_processes_than_tasks_are_refused(tmp_path: Path) -> None:
    port = free_port()
    process = start(
        [*SMALL, "task.meta_batch=1", f"hydra.run.dir={RUN}"], tmp_path, environment=environment(0, 2, port)
    )
    other = start([*SMALL, "task.meta_batch=1"], tmp_path / "1", environment=environment(1, 2, port))
    assert (finished(process), finished(other)) == (2, 2)
    assert "task.meta_batch=1: 2 processes share these tasks" in output(tmp_path)


def test_a_sweep_by_torchrun_is_refused(tmp_path: Path) -> None:
    process = start(["--multirun", *SMALL], tmp_path, environment=environment(0, 2, 1))
    assert finished(process) == 2
    assert "without --multirun" in output(tmp_path)
