"""Commands in processes of their own, as a user types them, and small settings for them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.faults.processes import run_script


def words(text: str) -> list[str]:
    return text.split()


SMALL = words("""
data=glyphs data.classes=50 model.width=8 task.meta_batch=4 outer.iterations=4 eval.every=2 eval.validation_episodes=4
eval.episodes=8
""")


def environment(**more: str) -> dict[str, str]:
    """Return the tests' environment with one thread, and without the location of the data."""
    inherited = {name: value for name, value in os.environ.items() if name != "METALEARN_DATA"}
    return {"OMP_NUM_THREADS": "1", **inherited, **more}


def python(*arguments: str, cwd: Path, code: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python to its end, and check its exit code."""
    settings: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment(**variables), check=False, **settings)
    assert done.returncode == code, done.stderr + done.stdout
    return done


def command(
    script: str, *arguments: str, cwd: Path, code: int = 0, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a script to its end; check its exit code, and that no error has a stack trace."""
    done = run_script(script, *arguments, cwd=cwd, environment=environment(**variables))
    assert done.returncode == code, done.stderr + done.stdout
    assert code == 0 or "Traceback" not in done.stderr + done.stdout
    return done


def bash(lines: str, *, cwd: Path) -> list[list[str]]:
    """Paste lines into a shell; return the words of each that begins with the name of one of these programs."""
    programs = "".join(f'{name}() {{ words {name} "$@"; }}\n' for name in ("python", "tensorboard", "path"))
    script = f"words() {{ printf '%s\\0' \"$@\" END; }}\n{programs}{lines}"
    done = subprocess.run(["bash", "-c", script], cwd=cwd, capture_output=True, check=True)
    commands = os.fsdecode(done.stdout).split("\0END\0")[:-1]
    return [command.split("\0") for command in commands]
