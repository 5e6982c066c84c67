"""Checks, verdicts, and code that is shown as it ran."""

from __future__ import annotations

import math

import pytest

from metalearn.config import commands_schema as schema_commands
from metalearn.lessons import LESSONS, Check, Lesson
from metalearn.lessons.lesson import source_of


def documented(x: int) -> int:
    """To be left out.

    With a second paragraph.
    """
    return x + 1


@pytest.mark.parametrize(
    ("computed", "expected", "tolerance", "passed"),
    [
        (2.0, 2.0, 0.0, True),
        (2.0 + 1e-9, 2.0, 1e-8, True),
        (2.0 + 1e-7, 2.0, 1e-8, False),
        (2, 3, 0.0, False),
        (math.nan, 2.0, 1.0, False),
        (math.inf, 2.0, 1.0, False),
        ("RuntimeError", "RuntimeError", 0.0, True),
        ("ValueError", "RuntimeError", 0.0, False),
        (0.0, "RuntimeError", 1.0, False),
    ],
)
def test_check_and_lesson_passed(computed: float | str, expected: float | str, tolerance: float, passed: bool) -> None:
    check = Check("", computed, expected, tolerance)
    assert check.passed is passed
    assert Lesson("", "", "", [Check("", 1.0, 1.0), check]).passed is passed


def test_lesson_without_checks_does_not_pass() -> None:
    assert not Lesson("", "", "", []).passed


def test_source_of_omits_docstring() -> None:
    assert source_of(documented) == "def documented(x: int) -> int:\n    return x + 1"


def test_schema_lists_all_lessons() -> None:
    assert tuple(LESSONS) == schema_commands.LESSONS
