"""The lesson under test."""

from __future__ import annotations

import importlib

import pytest

from metalearn.lessons import Lesson


@pytest.fixture(scope="module")
def lesson(request: pytest.FixtureRequest) -> Lesson:
    """Run the lesson that the test module is named after."""
    name = request.module.__name__.rpartition("test_")[2]
    result: Lesson = importlib.import_module(f"metalearn.lessons.{name}").lesson()
    return result
