"""An orderly end: a first SIGTERM or SIGINT is obeyed between two meta-steps, a second one at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import NoReturn

from metalearn.core.errors import TerminatedError

SIGHUP = (signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()
"""What a terminal that is closed sends; unknown to Windows."""

_SHOW_CURSOR = "\x1b[?25h"  # which a progress bar hides


_swallowed: list[int] = []
"""A signal whose ``SystemExit`` was swallowed, as in an import that catches everything; ``StopRequest`` obeys it."""


class StopRequest:
    """Notes a first SIGTERM or SIGINT, and ends the process at a second; a context manager.

    Outside of the main thread, where Python takes no signals, it notes none.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        self.signal = _swallowed.pop() if _swallowed else None
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal gave

    @property
    def asked(self) -> bool:
        """Whether the process was asked to end."""
        return self.signal is not None

    def refuse_to_go_on(self) -> None:
        """To be called where nothing would be lost.

        Raises:
            StoppedError: if the process was asked to end.
        """
        if self.signal is not None:
            raise TerminatedError(self.signal)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            if sys.stdout.isatty():
                os.write(1, _SHOW_CURSOR.encode())
            os.write(2, b"\nAsked a second time: ended at once, without a checkpoint.\n")
            os._exit(128 + number)
        self.signal = number


@contextmanager
def sigterm_as_exception(*others: int) -> Iterator[None]:
    """SIGTERM ends the process as an exception does, so that what it began is ended and removed as well.

    Args:
        others: signals that do the same, but where they are ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGTERM, *(n for n in others if signal.getsignal(n) != signal.SIG_IGN)]
    before = {n: signal.signal(n, _exit) for n in numbers}
    try:
        yield
    finally:
        _swallowed.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    _swallowed[:] = [number]
    sys.exit(128 + number)
