"""Several processes share a batch's tasks, and compute what one would."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from metalearn.core import serialization as files
from metalearn.core.errors import RunError
from metalearn.core.types import Episodes
from metalearn.training import loop
from metalearn.training.experiment import Experiment
from metalearn.training.runtime.distributed import DistributedContext
from metalearn.training.step import local_tasks
from metalearn.training.tracking.event_files import read_scalars
from metalearn.training.trainer import check_ranks_agree
from tests.config.factories import train_config
from tests.faults.processes import load_state, read_output, start_training, wait_for_exit
from tests.faults.runs import RUN, SMALL, assert_steps_increase, metrics_without_times
from tests.paths import REPO


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shards_partition_the_tasks(size: int) -> None:
    for count in (7, 8, 16):
        shards = [DistributedContext(rank, size).shard(count) for rank in range(size)]
        assert [task for shard in shards for task in shard] == list(range(count))
        assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_single_process_sends_nothing() -> None:
    alone = DistributedContext()
    tensors = [torch.ones(2), torch.zeros(())]
    assert all(a is b for a, b in zip(alone.all_reduce_sum(tensors), tensors, strict=True))
    assert alone.broadcast("x") == "x"
    assert alone.all_gather(tensors[0]) is tensors[0]


def environment(rank: int, size: int, port: int) -> Mapping[str, str]:
    """Return the environment that torchrun sets."""
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    return {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **ranks}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


PRINT_GLOO_THREADS = """
import os
import torch
from metalearn.training.runtime.distributed import init_distributed

with init_distributed(torch.device("cpu")) as ranks:
    import torch._dynamo  # as torch.optim does when an optimiser is first used

    ranks.all_gather(torch.ones(1))
print([name for t in os.listdir("/proc/self/task") if "gloo" in (name := open(f"/proc/self/task/{t}/comm").read())])
"""


def test_no_gloo_thread_outlives_the_group() -> None:
    """A thread that drops a tensor while Python shuts down ends the process by SIGABRT."""
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PRINT_GLOO_THREADS],
            env={**os.environ, **environment(rank, 2, port), "OMP_NUM_THREADS": "1"},
            cwd=REPO,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert [(out, process.returncode) for out, process in zip(outputs, processes, strict=True)] == [("[]", 0)] * 2


def train_together(
    size: int,
    folder: Path,
    *more: str,
    base: Sequence[str] = SMALL,
    before: Callable[[], None] | None = None,
    codes: tuple[int, ...] = (),
) -> Path:
    """Train with several processes, ``before`` called in the last; each writes its output into its own folder."""
    port = free_port()
    processes = [
        start_training(
            [*base, f"hydra.run.dir={folder / RUN}", *more],
            folder / str(rank),
            environment=environment(rank, size, port),
            before=before if rank == size - 1 else None,
        )
        for rank in range(size)
    ]
    found = tuple(wait_for_exit(process) for process in processes)
    assert found == (codes or (0,) * size), "\n".join(read_output(folder / str(rank)) for rank in range(size))
    return folder / RUN


def gradient_of_the_first_step(run_dir: Path) -> dict[int, Tensor]:
    """Return ten times Adam's first moment after one meta-step, which is the meta-gradient."""
    moments = load_state(run_dir)["state"]["optimizer"]["state"]
    return {i: 10 * m["exp_avg"] for i, m in moments.items()}


def test_two_processes_compute_the_gradient_of_one(tmp_path: Path) -> None:
    """Compare on three tasks, so that the shards are uneven, with clipping by the norm of the mean gradient."""
    one_step = ["outer.iterations=1", "eval.every=1", "outer.clip_norm=0.01"]
    theirs, ours = (gradient_of_the_first_step(train_together(n, tmp_path / str(n), *one_step)) for n in (1, 2))
    for i, gradient in theirs.items():
        assert (ours[i] - gradient).norm() <= 1e-5 * gradient.norm()
    assert torch.cat([g.flatten() for g in ours.values()]).norm().item() == pytest.approx(0.01, rel=1e-4)


def test_two_processes_end_where_one_does_and_only_the_main_one_writes(uninterrupted_run: Path, tmp_path: Path) -> None:
    by_two = train_together(2, tmp_path)
    ours, theirs = load_state(by_two)["state"], load_state(uninterrupted_run)["state"]
    for name, p in theirs["params"].items():
        torch.testing.assert_close(ours["params"][name], p, rtol=1e-3, atol=1e-4)
    metrics, alone = metrics_without_times(by_two), metrics_without_times(uninterrupted_run)
    assert metrics["test.accuracy"] == pytest.approx(alone["test.accuracy"])
    assert (metrics["processes"], metrics["iterations"]) == (2, 24)
    assert {p.name for p in (by_two.parent / "1").iterdir()} == {"output.txt"}
    assert read_output(by_two.parent / "1") == ""
    assert_steps_increase(by_two)


OWN_CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, ways, example_shape):
        super().__init__()
        self.body, self.head = nn.Linear(example_shape.numel(), 8), nn.Linear(8, ways)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x.flatten(1))))

def drawn():
    return {split: torch.rand(6, 7, 1, 8, 8) for split in ("train", "validation", "test")}
"""


def test_processes_share_tasks_of_own_code(tmp_path: Path) -> None:
    own = ["data=custom", "data.target=own_code:drawn", "model=custom", "model.target=own_code:Net"]
    settings = (
        [override for override in SMALL if not override.startswith(("data", "model"))] + own + ["outer.iterations=8"]
    )
    for size in (1, 2):
        for rank in range(size):
            (folder := tmp_path / str(size) / str(rank)).mkdir(parents=True)
            (folder / "own_code.py").write_text(OWN_CODE)
    alone, shared = (
        load_state(train_together(size, tmp_path / str(size), base=settings))["state"]["params"] for size in (1, 2)
    )
    for name, p in alone.items():
        torch.testing.assert_close(shared[name], p, rtol=1e-3, atol=1e-4)


def signal_itself_at(iteration: int, sent: signal.Signals = signal.SIGTERM) -> None:
    """Have this process signal itself when it samples that meta-step's tasks."""
    sample = loop.local_tasks  # type: ignore[attr-defined]  # possibly another patch of it

    def signal_and_sample(experiment: Experiment, at: int, ranks: DistributedContext) -> Episodes:
        if at == iteration:
            os.kill(os.getpid(), sent)
        episodes: Episodes = sample(experiment, at, ranks)
        return episodes

    pytest.MonkeyPatch().setattr(loop, "local_tasks", signal_and_sample)


def test_all_processes_stop_after_the_same_meta_step(tmp_path: Path) -> None:
    run_dir = train_together(2, tmp_path, before=partial(signal_itself_at, 4), codes=(143, 143))
    assert load_state(run_dir)["state"]["iteration"] == 5
    assert "checkpoint of meta-step 5 is kept" in " ".join(read_output(tmp_path / "0").split())


def test_a_lost_process_ends_the_run_which_one_resumes(uninterrupted_run: Path, tmp_path: Path) -> None:
    kill = partial(signal_itself_at, 4, signal.SIGKILL)
    run_dir = train_together(2, tmp_path, before=kill, codes=(2, -signal.SIGKILL))
    said = " ".join(read_output(tmp_path / "0").split())
    assert "process 0 of 2: another process of this run has ended" in said
    assert "run.resume=true" in said
    assert load_state(run_dir)["state"]["iteration"] == 4
    train_together(1, tmp_path, "run.resume=true")
    ours, theirs = load_state(run_dir)["state"], load_state(uninterrupted_run)["state"]
    assert ours["iteration"] == theirs["iteration"]
    for name, p in theirs["params"].items():  # sums over tasks are rounded differently
        torch.testing.assert_close(ours["params"][name], p, rtol=1e-3, atol=1e-4)
    assert_steps_increase(run_dir)


def save_slowly() -> None:
    """Slow down this process's saves, as on a slow disk."""
    save = files.save_checked

    def slow(content: Any, path: Path) -> None:
        time.sleep(0.5)
        save(content, path)

    pytest.MonkeyPatch().setattr(files, "save_checked", slow)


def test_workers_wait_for_the_main_process_to_save(tmp_path: Path) -> None:
    """Slurm and systemd signal all processes; torchrun ends the others when one has ended."""
    port = free_port()
    more = ["outer.iterations=100000", "eval.every=100000", "log.every=1", "run.checkpoint_every_s=60"]
    overrides = [*SMALL, *more, f"hydra.run.dir={tmp_path / RUN}"]
    first = start_training(overrides, tmp_path / "0", environment=environment(0, 2, port), before=save_slowly)
    second = start_training(overrides, tmp_path / "1", environment=environment(1, 2, port))
    until = time.monotonic() + 60
    while sum(p.stat().st_size for p in (tmp_path / RUN).glob("events*")) < 20_000:  # some ten meta-steps
        assert time.monotonic() < until
        time.sleep(0.05)
    for process in (first, second):
        os.kill(process.pid or 0, signal.SIGTERM)
    assert wait_for_exit(second) == 143, read_output(tmp_path / "1")
    assert load_state(tmp_path / RUN)["state"]["iteration"] > 0, "it was saved before the second ended"
    assert wait_for_exit(first) == 143, read_output(tmp_path / "0")


def test_check_ranks_agree_raises_for_other_data() -> None:
    config, worker = train_config(*SMALL), DistributedContext(1, 2)
    check_ranks_agree(config, config, worker)
    check_ranks_agree(train_config(*SMALL, "inner.engine=auto"), config, worker)
    with pytest.raises(RunError, match=r"(?s)process 1 would train on something else.*data\.jitter: 0\.3 here"):
        check_ranks_agree(train_config(*SMALL, "data.jitter=0.3"), config, worker)


def meet_a_nan() -> None:
    """Put a NaN into this process's tasks of the third meta-step."""

    def poisoned(experiment: Experiment, iteration: int, ranks: DistributedContext) -> Episodes:
        episodes = local_tasks(experiment, iteration, ranks)
        if iteration == 2:
            episodes.query_x[0, 0] = math.nan
        return episodes

    pytest.MonkeyPatch().setattr(loop, "local_tasks", poisoned)


def test_nan_of_one_process_stops_all(tmp_path: Path) -> None:
    run_dir = train_together(2, tmp_path, before=meet_a_nan, codes=(2, 2))
    assert "another process has found a loss or a gradient" in " ".join(read_output(tmp_path / "0").split())
    assert "[process 1] DivergedError: Training has diverged at meta-step 3: the query loss of task 1" in read_output(
        tmp_path / "1"
    )
    assert load_state(run_dir)["state"]["iteration"] == 2


def signal_itself_and_meet_a_nan() -> None:
    """Have both happen to this process in its third meta-step."""
    meet_a_nan()
    signal_itself_at(2)


def test_nan_of_one_process_is_skipped_by_all_which_share_the_stop_request(tmp_path: Path) -> None:
    skip, both = "run.on_nonfinite=skip", signal_itself_and_meet_a_nan
    run_dir = train_together(2, tmp_path, skip, before=both, codes=(143, 143))
    state = load_state(run_dir)["state"]
    assert (state["iteration"], state["skipped"]) == (3, [1, 1])


def test_init_from_is_read_by_the_main_process(tmp_path: Path, uninterrupted_run: Path) -> None:
    more = [f"run.init_from={uninterrupted_run}", "outer.iterations=8"]
    alone, shared = (train_together(n, tmp_path / str(n), *more) for n in (1, 2))
    (first, *_) = read_scalars(shared)["accuracy/validation"]
    assert first.step == 0
    best = metrics_without_times(uninterrupted_run)["validation.best_accuracy"]
    assert first.value == pytest.approx(best), "on the same tasks"
    params = load_state(shared)["state"]["params"]
    for name, p in load_state(alone)["state"]["params"].items():
        torch.testing.assert_close(params[name], p, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rank", [0, 1])
def test_more_processes_than_tasks_raise(rank: int, tmp_path: Path) -> None:
    alone = environment(rank, 2, 1)  # the other process is never there: the error comes before they meet
    process = start_training([*SMALL, "task.meta_batch=1"], tmp_path, environment=alone)
    assert wait_for_exit(process) == 2
    assert "task.meta_batch=1: 2 processes share these tasks" in read_output(tmp_path)


def test_torchrun_sums_up_the_error(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    training = [*command, str(REPO / "scripts" / "train.py"), "inner.lr=-1"]
    done = subprocess.run(training, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    summary = done.stderr.rpartition("Root Cause")[2]  # the first to fail, which ends the other
    assert "ConfigError: inner.lr=-1: must be a number above 0" in summary


def test_multirun_with_torchrun_raises(tmp_path: Path) -> None:
    process = start_training(["--multirun", *SMALL], tmp_path, environment=environment(0, 2, 1))
    assert wait_for_exit(process) == 2
    assert "without --multirun" in read_output(tmp_path)
