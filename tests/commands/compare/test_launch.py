"""Runs in processes of their own: what they say on their way out, and that none is left behind."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from metalearn.commands.compare.launch import ProcessPool, failure_reason


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_output_is_kept_and_watched(tmp_path: Path) -> None:
    seen: list[str] = []
    with ProcessPool() as children:
        code = "import os; print('threads', os.environ['OMP_NUM_THREADS'], flush=True); raise SystemExit(3)"
        status, written = children.run(python(code), tmp_path / "a" / "log", threads=2, watch=seen.append)
    assert status == 3
    assert written == "".join(seen)
    assert "threads" in written
    assert (tmp_path / "a" / "log").read_text() == written


def test_an_earlier_launchs_output_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("RunError: of yesterday\n")
    with ProcessPool() as children:
        _, written = children.run(python("print('today')"), log, threads=1, watch=lambda piece: None)
    assert written == "today\n"
    assert log.read_text() == "RunError: of yesterday\ntoday\n"


def test_no_child_outlives_its_parent(tmp_path: Path) -> None:
    code = "import time; print('up', flush=True); time.sleep(600)"

    def stop(piece: str) -> None:
        raise KeyboardInterrupt

    before = set(psutil.Process().children())
    children = ProcessPool()
    with pytest.raises(KeyboardInterrupt), children:
        children.run(python(code), tmp_path / "log", threads=1, watch=stop)
    (child,) = children.running
    assert child.returncode == -15, "it was asked to end, not killed"
    left = set(psutil.Process().children()) - before
    assert not [p for p in left if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_a_child_that_will_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metalearn.commands.compare.launch._GRACE_S", 0.2)
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    )
    children = ProcessPool()
    child = subprocess.Popen(python(code), stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"up\n"
    children.running.add(child)
    started = time.monotonic()
    with children:
        pass
    assert child.wait(10) == -9
    assert time.monotonic() - started < 10
    child.stdout.close()


def test_none_is_started_once_the_others_are_stopped(tmp_path: Path) -> None:
    children = ProcessPool()
    with children:
        pass
    with pytest.raises(ChildProcessError, match="being stopped"):
        children.run(python("print(1)"), tmp_path / "log", threads=1, watch=lambda piece: None)
    assert (tmp_path / "log").read_text() == ""


@pytest.mark.parametrize(
    ("status", "written", "reason"),
    [
        (
            2,
            "Run folder: x\nRunError: Training has diverged\nby meta-step 3\n",
            "RunError: Training has diverged\nby meta-step 3",
        ),
        (
            1,
            "Traceback (most recent call last):\n  File x\ntorch.OutOfMemoryError: CUDA\n",
            "torch.OutOfMemoryError: CUDA",
        ),
        (1, "ConfigError: old\nValueError: new", "ValueError: new"),
        (1, "RunError: real\nException ignored in: <x>\n", "RunError: real\nException ignored in: <x>"),
        (1, "OSError: full\n\nSet the environment variable HYDRA_FULL_ERROR=1 for ...\n", "OSError: full"),
        (-9, "fine so far", "ended by SIGKILL; the system kills so when memory runs out"),
        (-15, "", "ended by SIGTERM"),
        (3, "one\nlast words\n", "exit status 3: last words"),
        (0, "", "exit status 0: it wrote nothing"),
    ],
)
def test_why_a_run_failed(status: int, written: str, reason: str, tmp_path: Path) -> None:
    assert failure_reason(status, written, tmp_path) == reason


def test_a_run_with_metrics_is_finished_whatever_else_happened(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text("{}")
    assert failure_reason(-9, "RunError: x", tmp_path) is None
