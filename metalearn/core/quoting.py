"""Quote words for a shell, and values for Hydra's grammar, so that what is printed can be pasted."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def quote_word(word: str | Path) -> str:
    r"""Quote a word for a shell; one that cannot be printed as it is, as ``$'\x09'``, which bash and zsh read.

    Examples:
        >>> print(quote_word("a b"), quote_word("two\nlines"))
        'a b' $'two\x0alines'
    """
    word = str(word)
    if "'" in word and word.isprintable() and not set(word) & set('"$`\\!'):
        return f'"{word}"'  # shlex closes and opens its quotes around each in the word
    if word.isprintable():
        return shlex.quote(word)
    return f"$'{''.join(c if c.isprintable() and c not in _ESCAPED else _bytes(c) for c in word)}'"


_ESCAPED = "'\\"


def _bytes(character: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(character))


def quote_command(words: Iterable[str]) -> str:
    """Return a command line of words."""
    return " ".join(map(quote_word, words))


def format_assignment(key: str, path: str | Path) -> str:
    """Return ``KEY=PATH`` as Hydra reads it, with quotation marks only where its grammar needs them; not yet a word.

    Examples:
        >>> print(format_assignment("run.dir", "outputs/run-1"), format_assignment("run.dir", "a=b"))
        run.dir=outputs/run-1 run.dir='a=b'
    """
    is_plain = _PLAIN.fullmatch(str(path))
    return f"{key}={path if is_plain else format_override(str(path))}"


_PLAIN = re.compile(r"(?!\.\d|(?:true|false|null|nan|inf)\Z)[A-Za-z_./][\w./-]*", re.ASCII | re.IGNORECASE)
"""Text that Hydra's grammar takes for text; not a number, say."""


def format_override(value: Any) -> str:
    """Format a value in Hydra's grammar; text stands for itself, ``${`` included."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(format_override(v) for v in value)}]"
    if isinstance(value, dict):
        keys = (re.sub(r"([\\()\[\]{}:=, ])", r"\\\1", str(key)) for key in value)
        return f"{{{','.join(f'{k}:{format_override(v)}' for k, v in zip(keys, value.values(), strict=True))}}}"
    if isinstance(value, str):
        literal = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)  # OmegaConf halves backslashes before an interpolation
        quoted = re.sub(r"(\\*)('|\Z)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), literal, count=0)
        return f"'{quoted}'"
    return repr(value)
