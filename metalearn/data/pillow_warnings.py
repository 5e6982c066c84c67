"""Collect what Pillow warns of while it decodes images, by file, in place of lines of Python's own."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_reading = threading.local()
_LOCK = threading.Lock()  # Python's filters of warnings are one a process, and are restored in reverse order


@contextmanager
def collect_pillow_warnings() -> Iterator[dict[Path, str]]:
    """Yield the first warning of each file that the threads of the block read, each in ``warnings_of(path)``."""
    found: dict[Path, str] = {}
    with _LOCK, warnings.catch_warnings():
        warnings.simplefilter("always")
        show = warnings.showwarning

        def collect(message: Warning | str, *where: Any, **more: Any) -> None:
            if path := getattr(_reading, "path", None):
                found.setdefault(path, str(message).partition("\n")[0].rstrip("."))
            else:  # of a thread that reads no image
                show(message, *where, **more)

        warnings.showwarning = collect
        yield found


@contextmanager
def warnings_of(path: Path) -> Iterator[None]:
    """Attribute to a file what this thread is warned of in the block."""
    _reading.path = path
    try:
        yield
    finally:
        del _reading.path
