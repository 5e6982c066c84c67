"""Graceful shutdown: a first SIGTERM or SIGINT stops between two meta-steps, a second one at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from metalearn.core.errors import TerminatedError

SIGHUP = (signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()
"""Sent when a terminal is closed; unknown to Windows."""

_SHOW_CURSOR = "\x1b[?25h"  # a progress bar hides it

_swallowed: list[int] = []
"""A signal whose ``SystemExit`` was swallowed, as by an import that catches everything; ``StopRequest`` obeys it."""


class StopRequest:
    """Records a first SIGTERM or SIGINT, and ends the process at a second; a context manager.

    Outside the main thread, where Python delivers no signals, it records none.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous_handlers: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        self.signal = _swallowed.pop() if _swallowed else None
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous_handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal returned

    @property
    def requested(self) -> bool:
        """True if the process was asked to stop."""
        return self.signal is not None

    def raise_if_requested(self) -> None:
        """Raise ``TerminatedError`` here, where nothing would be lost, if the process was asked to stop."""
        if self.signal is not None:
            raise TerminatedError(self.signal)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            if sys.stdout.isatty():
                os.write(1, _SHOW_CURSOR.encode())
            os.write(2, b"\nAsked a second time: ended at once, without a checkpoint.\n")
            os._exit(128 + number)
        self.signal = number


@contextmanager
def sigterm_as_exception(*others: int) -> Iterator[None]:
    """Turn SIGTERM, and others that are not ignored, into ``SystemExit``, so that children and files are cleaned up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGTERM, *(n for n in others if signal.getsignal(n) != signal.SIG_IGN)]
    previous_handlers = {n: signal.signal(n, _exit) for n in numbers}
    try:
        yield
    finally:
        _swallowed.clear()
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    _swallowed[:] = [number]
    sys.exit(128 + number)
