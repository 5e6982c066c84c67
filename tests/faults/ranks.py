"""A training by several processes, one of which is killed."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import torch

from tests.conftest import REPO
from tests.faults.processes import state_of, wait_for_state
from tests.faults.runs import RUN, SMALL, STEPS, assert_curves, assert_same
from tests.faults.suite import Row

ENDS_IN_S = 60.0


def torchrun(processes: int, folder: Path, *more: str) -> subprocess.Popen[str]:
    """Start the small training by several processes."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("METALEARN_DATA", None)
    with (folder / "output.txt").open("w") as terminal:
        return subprocess.Popen(
            [*command, str(REPO / "scripts" / "train.py"), *SMALL, f"hydra.run.dir={RUN}", *more],
            cwd=folder,
            env=environment,
            stdout=terminal,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def to_the_end(processes: int, folder: Path, *more: str) -> Path:
    """As ``torchrun``, and wait; returns the run's folder."""
    status = torchrun(processes, folder, *more).wait(120)
    assert status == 0, (folder / "output.txt").read_text()
    return folder / RUN


def whole_by_two(shared: Path) -> Path:
    """The uninterrupted run by two processes, made once."""
    folder = shared / "whole by two"
    return folder / RUN if (folder / RUN / "metrics.json").exists() else to_the_end(2, folder)


def kill_a_rank(i: int, folder: Path, shared: Path) -> None:
    """The second process or the first, in turns; then the run goes on with two processes, or with one or three."""
    victim = 1 - i % 2
    run = torchrun(2, folder)
    try:
        wait_for_state(folder / RUN, random.Random(i).randrange(1, STEPS), run)
        os.kill(_child(run.pid, victim), signal.SIGKILL)
        assert run.wait(ENDS_IN_S) != 0  # or subprocess.TimeoutExpired
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    said = " ".join((folder / "output.txt").read_text().split())
    assert "another process of this run has ended" in said, said
    assert "run.resume=true" in said
    processes = (2, 2, 1, 3, 2)[i]
    run_dir = to_the_end(processes, folder, "run.resume=true")
    expected = whole_by_two(shared)
    if processes == 2:
        assert_same(run_dir, expected)
        return
    assert_curves(run_dir)
    ours, theirs = state_of(run_dir)["state"], state_of(expected)["state"]
    assert ours["iteration"] == theirs["iteration"]
    for name, p in theirs["params"].items():  # sums over tasks are rounded otherwise
        torch.testing.assert_close(ours["params"][name], p, rtol=1e-3, atol=1e-4)


def _child(parent: int, rank: int) -> int:
    """The process of that number among those that torchrun has started."""
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        environment = Path(f"/proc/{child}/environ").read_bytes().decode(errors="replace")
        if re.search(rf"(^|\0)RANK={rank}\0", environment):
            return int(child)
    raise AssertionError(f"torchrun has no process {rank}")


RANKS = Row(
    "rank",
    "a rank killed under torchrun",
    "ends in under 60 s with a message, resumes to the same result",
    tries=5,
    attempt=kill_a_rank,
    short=(0,),
    seconds=30,
)
