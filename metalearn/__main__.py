"""Where ``metalearn``, ``python -m metalearn`` and the scripts begin; Ctrl-C is heeded while modules are imported."""

from __future__ import annotations

import sys
from typing import NoReturn


def start(command: str | None = None) -> None:
    """Run a command, or the one that the first argument names."""
    try:
        from metalearn.commands.main import COMMANDS, main
    except ModuleNotFoundError as error:
        sys.exit(f"{error} in {sys.executable}: activate the environment that has it, as with `. .venv/bin/activate`.")
    except KeyboardInterrupt:
        _interrupted()
    try:
        (COMMANDS[command] if command else main)()
    except KeyboardInterrupt:
        _interrupted()


def _interrupted() -> NoReturn:
    print("Interrupted.", file=sys.stderr)
    sys.exit(130)


if __name__ == "__main__":
    start()
