"""Where scripts and ``metalearn`` begin: without the environment, and at Ctrl-C before anything is imported."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from typing import Any

import pytest

from metalearn.__main__ import start
from tests.paths import REPO


@pytest.mark.parametrize(("path", "missing"), [("", "metalearn"), (str(REPO), "hydra|omegaconf")])
def test_script_outside_of_the_environment_says_so(path: str, missing: str) -> None:
    environment = {**os.environ, "PYTHONPATH": path}
    script = [sys.executable, "-S", str(REPO / "scripts" / "train.py")]  # -S: without installed packages
    ended = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert any(
        line.startswith(f"No module named '{name}' in {sys.executable}: activate") for name in missing.split("|")
    )


def test_interrupt_while_importing_has_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupted(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "metalearn.commands.main", Interrupted("main"))
    with pytest.raises(SystemExit) as ended:
        start("train")
    assert ended.value.code == 130
    assert capsys.readouterr().err == "Interrupted.\n"
