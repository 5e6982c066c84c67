"""Explain words of a command line that are no ``KEY=VALUE``: dashes, blanks around the sign, a value alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from metalearn.commands.command_line import FLAGS, FLAGS_WITH_VALUE, parse_overrides
from metalearn.config.messages import nearest_key
from metalearn.core.errors import ConfigError
from metalearn.core.quoting import format_assignment, quote_word

_ALONE = {
    "gradients": ["lesson"],
    "evaluate": ["run"],
    "adapt": ["run", "support", "query"],
    "reproduce": ["experiment_name"],
}
"""The keys that values are probably meant for which stand alone, one after another."""


@dataclass(frozen=True)
class Mistake:
    """Words of a command line, and what was probably meant."""

    words: str
    meant: str

    def __str__(self) -> str:
        return f"{self.words}: keys are written KEY=VALUE, without dashes and blanks. Did you mean {self.meant}?"


def find_mistakes(command: str, kind: Any, arguments: Sequence[str]) -> list[Mistake]:
    """Return the words of a command line that are neither flags nor ``KEY=VALUE``; ``kind`` is the command's schema."""
    found, rest = [], list(arguments)
    given = {word.partition("=")[0] for word in arguments}
    alone = [key for key in _ALONE.get(command, []) if key not in given]
    while rest:
        word = rest.pop(0)
        flag = word.partition("=")[0]
        if flag in FLAGS:
            if word in FLAGS_WITH_VALUE and rest and _is_value(rest[0]):
                rest.pop(0)
        elif word.startswith("-"):
            key, sign, value = word.lstrip("-").partition("=")
            words = [word]
            if not sign and rest and _is_value(rest[0]):
                words.append(value := rest.pop(0))
            found.append(Mistake(" ".join(words), _assignment(key, value or "VALUE", kind)))
        elif "=" not in word and not word.startswith("~"):
            words, key, value = [word], word, ""
            if rest and rest[0].startswith("="):  # KEY = VALUE, KEY =VALUE
                words.append(rest.pop(0))
                value = words[-1].removeprefix("=")
                if not value and rest:
                    words.append(value := rest.pop(0))
            elif rest and _is_value(rest[0]) and "/" not in word and nearest_key(word, kind):  # KEY VALUE, and no path
                words.append(value := rest.pop(0))
            elif word.endswith((".yaml", ".yml")) and "experiment/" in word:
                key, value = "experiment", PurePath(word).stem
            elif alone and not nearest_key(word, kind, exact=True):
                key, value = alone.pop(0), word
            found.append(Mistake(" ".join(words), _assignment(key, value or "VALUE", kind)))
        elif word.endswith("=") and rest and _is_value(rest[0]):
            found.append(Mistake(f"{word} {rest[0]}", f"{word}{rest.pop(0)}"))
    return found


def _is_value(word: str) -> bool:
    return "=" not in word and not word.startswith(("-", "~"))


def _assignment(key: str, value: str, kind: Any) -> str:
    if key in ("config", "conf", "config_file", "config-file"):
        return f"experiment={PurePath(value).stem}, of conf/experiment/"
    key = nearest_key(key, kind) or key
    try:
        parse_overrides([assignment := f"{key}={value}"])
    except ConfigError:  # a path with an equals sign, say
        assignment = format_assignment(key, value)
    return quote_word(assignment)
