"""A training by several processes ends when one of them is killed, and resumes with any number of them."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.faults.cases import cases
from tests.faults.processes import load_state, wait_for_checkpoint
from tests.faults.runs import RUN, SMALL_RUN, STEPS, assert_runs_equal, assert_steps_increase
from tests.paths import REPO

ENDS_IN_S = 60.0


def torchrun(processes: int, folder: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("METALEARN_DATA", None)
    with (folder / "output.txt").open("w") as terminal:
        return subprocess.Popen(
            [*command, str(REPO / "scripts" / "train.py"), *SMALL_RUN, *more],
            cwd=folder,
            env=environment,
            stdout=terminal,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def train_with(processes: int, folder: Path, *more: str) -> Path:
    status = torchrun(processes, folder, *more).wait(120)
    assert status == 0, (folder / "output.txt").read_text()
    return folder / RUN


@pytest.fixture(scope="module")
def uninterrupted_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_with(2, tmp_path_factory.mktemp("uninterrupted by two"))


def pid_of(rank: int, torchrun_pid: int) -> int:
    """Find the process of a rank among those that torchrun has started."""
    for child in Path(f"/proc/{torchrun_pid}/task/{torchrun_pid}/children").read_text().split():
        environment = Path(f"/proc/{child}/environ").read_bytes().decode(errors="replace")
        if re.search(rf"(^|\0)RANK={rank}\0", environment):
            return int(child)
    raise AssertionError(f"torchrun has no process {rank}")


@pytest.mark.fault("a rank killed under torchrun", "ends in under 60 s with a message, resumes to the same result")
@pytest.mark.parametrize("case", cases(enumerate([2, 2, 1, 3, 2]), quick=[]))
def test_killed_rank(case: tuple[int, int], tmp_path: Path, uninterrupted_pair: Path) -> None:
    seed, processes = case  # which resume
    victim = 1 - seed % 2
    run = torchrun(2, tmp_path)
    try:
        wait_for_checkpoint(tmp_path / RUN, random.Random(seed).randrange(1, STEPS), run)
        os.kill(pid_of(victim, run.pid), signal.SIGKILL)
        assert run.wait(ENDS_IN_S) != 0  # or subprocess.TimeoutExpired
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    said = " ".join((tmp_path / "output.txt").read_text().split())
    assert "another process of this run has ended" in said, said
    assert "run.resume=true" in said
    run_dir = train_with(processes, tmp_path, "run.resume=true")
    if processes == 2:
        assert_runs_equal(run_dir, uninterrupted_pair)
        return
    assert_steps_increase(run_dir)
    ours, theirs = load_state(run_dir)["state"], load_state(uninterrupted_pair)["state"]
    assert ours["iteration"] == theirs["iteration"]
    for name, p in theirs["params"].items():  # sums over tasks are rounded differently
        torch.testing.assert_close(ours["params"][name], p, rtol=1e-3, atol=1e-4)
