"""What the tests of the lessons share: every number of a lesson held against values that the test itself gives."""

from __future__ import annotations

from typing import Any

import pytest

from metalearn.lessons import Lesson


def zero(tolerance: float) -> Any:
    """A number that is 0 up to rounding."""
    return pytest.approx(0, abs=tolerance)


def computed(lesson: Lesson, what: str) -> float | str:
    """The number of a check, which there is once."""
    (check,) = [check for check in lesson.checks if check.what == what]
    return check.computed


def assert_complete(lesson: Lesson, expected: dict[str, Any]) -> None:
    """The test holds every number that the lesson has, the lesson's own verdict is right, and its code can be read."""
    assert [check.what for check in lesson.checks] == list(expected)
    assert [check.what for check in lesson.checks if not check.right] == []
    assert max(len(line) for line in lesson.code.splitlines()) <= 96, "the console breaks longer lines"
    assert '"""' not in lesson.code
    assert all(figure.axes for figure in lesson.plots.values())
