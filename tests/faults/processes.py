"""Commands in processes that can be killed, forked from one that has imported torch already, which takes seconds."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from metalearn.training.checkpoints import load_latest, state_paths
from tests.paths import REPO

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["metalearn.training.trainer", "tests.faults.runs", "matplotlib.pyplot", "tensorboard", "torch._dynamo"]
)
_LONGEST_S = 120.0


def start_training(
    arguments: list[str],
    folder: Path,
    *,
    before: Callable[..., None] | None = None,
    args: tuple[Any, ...] = (),
    environment: Mapping[str, str] | None = None,
) -> ForkServerProcess:
    """Start ``scripts/train.py`` with these arguments in a folder; its output goes to ``output.txt`` there.

    ``before(*args)``, a function at the top level of a module, is called first in the process, to bring a fault about;
    ``environment`` is added to that of the process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "output.txt").write_text("")
    process = _CONTEXT.Process(target=_command, args=(arguments, folder, before, args, dict(environment or {})))
    process.start()
    return process


def run_script(
    script: str, *arguments: str, cwd: Path, environment: Mapping[str, str], timeout_s: float = 300.0
) -> subprocess.CompletedProcess[str]:
    """Run a script to its end, in this environment alone."""
    with tempfile.TemporaryDirectory() as folder:
        output = [Path(folder) / name for name in ("stdout", "stderr")]
        process = _CONTEXT.Process(target=_run_script, args=(script, arguments, cwd, output, dict(environment)))
        process.start()
        code = wait_for_exit(process, timeout_s=timeout_s)
        return subprocess.CompletedProcess([script, *arguments], code, *(path.read_text() for path in output))


def wait_for_exit(process: ForkServerProcess, *, timeout_s: float = _LONGEST_S) -> int:
    """Wait for a process and return its exit code, or the negative number of the signal that ended it."""
    process.join(timeout_s)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"still at work after {timeout_s:.0f} s")
    return process.exitcode


def read_output(folder: Path) -> str:
    return (folder / "output.txt").read_text()


def _command(
    arguments: list[str],
    folder: Path,
    before: Callable[..., None] | None,
    args: tuple[Any, ...],
    environment: dict[str, str],
) -> None:
    os.environ.pop("METALEARN_DATA", None)
    os.environ.update(environment)
    _prepare(folder, folder / "output.txt", folder / "output.txt")
    if before is not None:
        before(*args)
    _run("train.py", arguments)


def _run_script(
    script: str, arguments: Sequence[str], folder: Path, output: Sequence[Path], environment: dict[str, str]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    _prepare(folder, *output)
    _run(script, arguments)


def _prepare(folder: Path, stdout: Path, stderr: Path) -> None:
    """Make a forked process like one that a shell has started in a folder."""
    import torch

    os.chdir(folder)
    for descriptor, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have told the tests to ignore these
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    torch.set_num_threads(1)


def _run(script: str, arguments: Sequence[str]) -> None:
    path = str(REPO / "scripts" / script)
    sys.argv = [path, *arguments]
    runpy.run_path(path, run_name="__main__")


def wait_for_checkpoint(run_dir: Path, iteration: int, process: ForkServerProcess | subprocess.Popen[str]) -> None:
    """Wait until a run has saved its state after that many meta-steps."""
    until = time.monotonic() + _LONGEST_S
    while not any(int(path.stem.removeprefix("state-")) >= iteration for path in state_paths(run_dir)):
        ended = process.poll() if isinstance(process, subprocess.Popen) else process.exitcode
        assert ended is None, f"it ended by itself: {ended}"
        assert time.monotonic() < until, "it takes too long"
        time.sleep(0.002)


def load_state(run_dir: Path) -> dict[str, Any]:
    content = load_latest(run_dir)
    assert content is not None, f"{run_dir} holds no state"
    return content
