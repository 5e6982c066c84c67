"""Plural forms, and lines as wide as the terminal."""

from __future__ import annotations

import io

import pytest

from metalearn.core.text import fit, format_duration, format_number, plural, wrap

PATH = "/a/very-long/path/" + "x" * 30


def test_one_is_no_plural() -> None:
    assert [plural(n, "class", "classes") for n in (0, 1, 2)] == ["0 classes", "1 class", "2 classes"]
    assert [plural(n, "run") for n in (1, 2)] == ["1 run", "2 runs"]


def test_lines_are_broken_between_words_only() -> None:
    text = f"RunError: {PATH}: this folder is not here at all.\n  metalearn train data.root={PATH} a b c d\n\nend"
    lines = wrap(text, 30)
    assert lines == [
        *("RunError:", f"{PATH}: this" if len(PATH) < 24 else f"{PATH}:", "this folder is not here at"),
        *("all.", f"  metalearn train data.root={PATH} a b c d", "", "end"),
    ]
    assert wrap("one two three", 10, indent="    ", first="- ") == ["- one two", "    three"]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_only_a_terminals_text_is_wrapped(is_terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: is_terminal)
    text = "five words of four characters"
    assert fit(text, stream) == ("five words of four\ncharacters" if is_terminal else text)


def test_format_number_and_duration() -> None:
    assert [format_number(value) for value in (1234.4, 12.34, 0.567)] == ["1234", "12.3", "0.57"]
    assert [format_duration(value) for value in (35, 378, 8640)] == ["35.0 s", "6.3 min", "2.4 h"]
