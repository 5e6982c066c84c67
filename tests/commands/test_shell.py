"""How a command sees the shell: the words that started it, and an output that nobody reads to its end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from metalearn.commands.shell import invocation
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
