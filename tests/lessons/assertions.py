"""Compare the numbers of a lesson with values that its test gives."""

from __future__ import annotations

from typing import Any

import pytest

from metalearn.lessons import Lesson


def zero(tolerance: float) -> Any:
    """Return a number that is 0 up to rounding."""
    return pytest.approx(0, abs=tolerance)


def assert_checks(lesson: Lesson, expected: dict[str, Any]) -> None:
    """Check every number of the lesson, its own verdict, and that its code and plots can be shown."""
    assert {check.name: check.computed for check in lesson.checks} == expected
    assert [check.name for check in lesson.checks] == list(expected)
    assert [check.name for check in lesson.checks if not check.passed] == []
    assert max(len(line) for line in lesson.code.splitlines()) <= 96, "the console breaks longer lines"
    assert '"""' not in lesson.code
    assert all(figure.axes for figure in lesson.plots.values())
