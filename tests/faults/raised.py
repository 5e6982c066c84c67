"""What counts as one of our errors."""

from __future__ import annotations

import dis
import re

from metalearn.core.errors import MetalearnError

RAISE = bytes([dis.opmap["RAISE_VARARGS"]])
"""The instruction of a ``raise`` statement."""


def must_be_ours(error: Exception) -> None:
    """Raise it again unless metalearn raised it, by a ``raise`` of its own, and it says what it is about."""
    if isinstance(error, MetalearnError):
        return
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    assert trace is not None
    home = str(trace.tb_frame.f_globals.get("__name__"))
    by_statement = trace.tb_frame.f_code.co_code[trace.tb_lasti : trace.tb_lasti + 1] == RAISE
    if not (isinstance(error, (ValueError, TypeError)) and home.startswith("metalearn.") and by_statement):
        raise AssertionError(f"raw from {home}: {type(error).__name__}: {error}") from error
    assert re.search(r"\d|is \w+|'|=\w|\(\)", str(error)), f"says nothing: {error}"
