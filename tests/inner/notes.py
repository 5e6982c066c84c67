"""Notes of exceptions, for tests of error messages."""

from __future__ import annotations


def full_message(error: BaseException) -> str:
    """Return the message with its notes, as a traceback shows them."""
    return "\n".join([str(error), *getattr(error, "__notes__", [])])
