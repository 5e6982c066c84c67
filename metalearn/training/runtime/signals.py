"""Graceful shutdown: a first signal stops between two meta-steps, a second SIGTERM or SIGINT at once."""

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

_INSISTENT = (signal.SIGTERM, signal.SIGINT)
_NAMES = ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
_OTHERS = tuple(number for number in signal.Signals if number.name in _NAMES)
"""Sent when a terminal is closed, and by batch systems before a limit of time. Windows knows none of them."""

_SHOW_CURSOR = "\x1b[?25h"  # a progress bar hides it

_swallowed: list[int] = []
"""A signal whose ``SystemExit`` was swallowed, as by an import that catches everything; ``StopRequest`` obeys it."""


class StopRequest:
    """Records a signal that asks the process to end, and ends it at a second SIGTERM or SIGINT; a context manager.

    The other signals may come in numbers: a closed terminal sends two, a limit of CPU time one every second. Outside
    the main thread, where Python delivers no signals, it records none.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous_handlers: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        self.signal = _swallowed.pop() if _swallowed else None
        if threading.current_thread() is threading.main_thread():
            for number in (*_INSISTENT, *_unhandled()):
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
        if number in _INSISTENT and self.signal in _INSISTENT:
            if sys.stdout.isatty():
                os.write(1, _SHOW_CURSOR.encode())
            os.write(2, b"\nAsked a second time: ended at once, without a checkpoint.\n")
            os._exit(128 + number)
        if number in _INSISTENT or self.signal is None:
            self.signal = number


def terminated_by(error: SystemExit) -> TerminatedError | None:
    """Return the error of a process that ends as a shell reports a signal, as where its output is closed (SIGPIPE)."""
    number = error.code - 128 if isinstance(error.code, int) else 0
    return TerminatedError(number) if number in set(signal.Signals) else None


def _unhandled() -> list[int]:
    """Return the other signals that would end the process: nobody ignores them (``nohup``) or has a use for them."""
    return [number for number in _OTHERS if signal.getsignal(number) in (signal.SIG_DFL, _exit)]


@contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """Turn SIGTERM, and the others that would end the process, into ``SystemExit``, so that children end as well."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous_handlers = {number: signal.signal(number, _exit) for number in (signal.SIGTERM, *_unhandled())}
    try:
        yield
    finally:
        _swallowed.clear()
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    _swallowed[:] = [number]
    sys.exit(128 + number)
