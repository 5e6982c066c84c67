"""Paths as users write them. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from metalearn.core.errors import ConfigError


class NoHomeError(ConfigError, RuntimeError):
    """A ``~`` whose home folder is not known."""


def expand_home(path: str | Path, instead: str = "write the whole path") -> Path:
    """Return a path with ``~`` and ``~user`` replaced by the home folder.

    Raises:
        NoHomeError: if that is not known, as of a user without a passwd entry and ``HOME``.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise NoHomeError(f"{path}: no home folder is known for the ~ in it; {instead}, or set HOME") from None
