"""Text for people: plural forms, and lines as wide as the terminal."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from typing import TextIO

MAX_LISTED = 5
"""Names in a message before the rest is only counted."""


def plural(count: int, noun: str, nouns: str | None = None) -> str:
    """Return a count and what is counted.

    Example:
        >>> plural(1, "class", "classes"), plural(2, "run")
        ('1 class', '2 runs')
    """
    return f"{count} {noun if count == 1 else nouns or f'{noun}s'}"


def preview_names(names: Sequence[str]) -> str:
    """Join the first few names, and say how many more there are."""
    more = f", and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more


def cut(text: str, limit: int = 2000) -> str:
    """Return text, or the beginning of one that is too long for a message.

    Example:
        >>> cut("0123456789", limit=4)
        '0123... (10 characters)'
    """
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text):,} characters)"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if that is empty."""
    return str(error).partition("\n")[0] or type(error).__name__


def format_number(value: float) -> str:
    """Format with three digits, or all before the point."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f}"


def format_duration(seconds: float) -> str:
    """Format in the unit that suits the length."""
    if seconds < 120:
        return f"{format_number(seconds)} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def wrap(text: str, width: int, *, indent: str = "", first: str | None = None) -> list[str]:
    """Break text into lines between words only, so that paths and overrides can be copied.

    Args:
        text: whose own lines stay apart; one that begins with two blanks, as a command, is not broken.
        width: of a line, in characters.
        indent: before every line.
        first: before the first line, in the place of ``indent``.
    """
    lines: list[str] = []
    for line in text.split("\n"):
        start = indent if lines or first is None else first
        whole = line.startswith("  ") or not line
        lines += [start + line] if whole else textwrap.wrap(
            line,
            width,
            initial_indent=start,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )  # fmt: skip
    return lines


def fit(text: str, stream: TextIO) -> str:
    """Return text as wide as the terminal; unchanged if the stream is a file or a pipe, where it may be searched."""
    return "\n".join(wrap(text, shutil.get_terminal_size().columns)) if stream.isatty() else text
