"""Child processes, none of which is left behind; and how a command sees the shell."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from metalearn.commands.processes import METALEARN, ProcessPool
from metalearn.commands.shell import invocation, tensorboard
from metalearn.core.quoting import quote_command
from tests.paths import REPO


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("/venv/bin/metalearn", ["metalearn", "train"]),
        ("C:/venv/Scripts/metalearn.exe", ["metalearn", "train"]),
        ("/site-packages/metalearn/__main__.py", ["python", "-m", "metalearn", "train"]),
        ("scripts/train.py", ["python", "scripts/train.py"]),
    ],
)
def test_invocation_names_what_was_typed(program: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [program, "inner.steps=1"])
    assert invocation("train") == words


def test_printed_programs_are_those_of_an_environment_that_is_not_activated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ours, others = tmp_path / "env" / "bin", tmp_path / "others"
    for folder in (ours, others):
        folder.mkdir(parents=True)
        for name in ("python", "tensorboard"):
            (folder / name).write_text("#!/bin/sh\n")
            (folder / name).chmod(0o755)
    monkeypatch.setattr("sys.argv", ["scripts/train.py"])
    monkeypatch.setattr("sys.executable", str(ours / "python"))
    monkeypatch.setenv("PATH", str(others))
    monkeypatch.chdir(others)
    assert invocation("train") == [str(ours / "python"), "scripts/train.py"]
    assert tensorboard(others) == quote_command([str(ours / "tensorboard"), "--logdir", "."])
    monkeypatch.chdir(tmp_path)
    assert invocation("train") == ["env/bin/python", "scripts/train.py"]
    monkeypatch.chdir(ours)
    assert invocation("train") == [str(ours / "python"), "scripts/train.py"], "a shell looks for names on PATH"

    (others / "tensorboard").unlink()
    (others / "tensorboard").symlink_to(ours / "tensorboard")  # as pipx does
    assert tensorboard(ours) == "tensorboard --logdir ."
    monkeypatch.setenv("PATH", str(ours), prepend=os.pathsep)
    assert invocation("train") == ["python", "scripts/train.py"]

    (ours / "python").rename(ours / "python3")  # and no python beside it
    monkeypatch.setattr("sys.executable", str(ours / "python3"))
    assert invocation("train") == ["python3", "scripts/train.py"]
    monkeypatch.setenv("PATH", str(others))
    assert invocation("train") == [str(ours / "python3"), "scripts/train.py"]
    monkeypatch.setattr("sys.executable", "")
    assert invocation("train") == ["python", "scripts/train.py"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["-m", "metalearn", "--help"],
        ["-m", "metalearn", "train", "--help"],
        [str(REPO / "scripts" / "train.py"), "--help"],
        [str(REPO / "scripts" / "train.py"), "--cfg", "job"],
        ["-m", "metalearn", "gradients", "lesson=create_graph"],
    ],
    ids=["help", "train_help", "script_help", "cfg", "table"],
)
def test_exits_quietly_when_nobody_reads(arguments: list[str], tmp_path: Path) -> None:
    # The pipe is closed before the command starts: short outputs would fit into it otherwise.
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(REPO)},
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            timeout=300,
            check=False,
        )
    assert (done.returncode, done.stderr) == (141, "")  # 128 + SIGPIPE, as a shell reports it


def test_command_is_started_with_the_working_directory_searched_last(tmp_path: Path) -> None:
    (tmp_path / "random.py").write_text("raise SystemExit('not the random of the standard library')")
    words = [*METALEARN, "train", "--cfg", "job", "inner.lr=0.125"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "lr: 0.125" in done.stdout


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_run_captures_output_and_status(tmp_path: Path) -> None:
    seen: list[str] = []
    with ProcessPool() as pool:
        code = "import os; print('threads', os.environ['OMP_NUM_THREADS'], flush=True); raise SystemExit(3)"
        status, written = pool.run(python(code), tmp_path / "a" / "log", threads=2, callback=seen.append)
    assert status == 3
    assert written == "".join(seen)
    assert "threads" in written
    assert (tmp_path / "a" / "log").read_text() == written


def test_run_returns_only_its_own_output_when_log_exists(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("RunError: of yesterday\n")
    with ProcessPool() as pool:
        _, written = pool.run(python("print('today')"), log, threads=1, callback=lambda piece: None)
    assert written == "today\n"
    assert log.read_text() == "RunError: of yesterday\ntoday\n"


def test_children_are_terminated_when_interrupted(tmp_path: Path) -> None:
    code = "import time; print('up', flush=True); time.sleep(600)"

    def stop(piece: str) -> None:
        raise KeyboardInterrupt

    before = set(psutil.Process().children())
    pool = ProcessPool()
    with pytest.raises(KeyboardInterrupt), pool:
        pool.run(python(code), tmp_path / "log", threads=1, callback=stop)
    (child,) = pool.running
    assert child.returncode == -15, "it was asked to end, not killed"
    left = set(psutil.Process().children()) - before
    assert not [p for p in left if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_child_is_killed_when_it_ignores_sigterm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metalearn.commands.processes._GRACE_S", 0.2)
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    )
    pool = ProcessPool()
    child = subprocess.Popen(python(code), stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"up\n"
    pool.running.add(child)
    started = time.monotonic()
    with pool:
        pass
    assert child.wait(10) == -9
    assert time.monotonic() - started < 10
    child.stdout.close()


def test_run_raises_when_pool_is_closed(tmp_path: Path) -> None:
    pool = ProcessPool()
    with pool:
        pass
    with pytest.raises(ChildProcessError, match="being stopped"):
        pool.run(python("print(1)"), tmp_path / "log", threads=1, callback=lambda piece: None)
    assert (tmp_path / "log").read_text() == ""
