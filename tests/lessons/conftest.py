"""The lessons under test."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest

from metalearn.lessons import LESSONS, Lesson

RunLesson = Callable[[str], Lesson]


@pytest.fixture(scope="session")
def run_lesson() -> RunLesson:
    """Return a function that runs a lesson, by its name in ``LESSONS``, once."""
    return functools.cache(lambda name: LESSONS[name]())
