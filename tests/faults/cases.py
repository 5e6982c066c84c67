"""Cases of a fault (few or none in every run, all in ``make faults``), random ones by hypothesis, errors allowed."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Container, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import metalearn
from metalearn.core.errors import MetalearnError


def assert_raised_by_metalearn(error: Exception) -> None:
    """Check that metalearn raised the error or explained it in a note, and that a value is named.

    Raises:
        AssertionError: the error came out of torch, Python or another library as it was.
    """
    if isinstance(error, MetalearnError):
        return
    text = "\n".join([str(error), *getattr(error, "__notes__", [])])
    if re.search(r"Raised in .* Given: .*\[", text):  # the tensors' shapes
        return
    origin = traceback.extract_tb(error.__traceback__)[-1]
    inside = Path(origin.filename).is_relative_to(Path(metalearn.__file__).parent)
    if not (isinstance(error, (ValueError, TypeError)) and inside and (origin.line or "").startswith("raise ")):
        raise AssertionError(f"raw from {origin.filename}: {type(error).__name__}: {error}") from error
    assert re.search(r"\d|is \w+|'|=\w|\(\)", str(error)), f"the message names no value: {error}"


if TYPE_CHECKING:
    from _pytest.mark import ParameterSet

Case = TypeVar("Case")


def cases(values: Iterable[object], *, quick: Container[int]) -> list[ParameterSet]:
    """Mark all values as slow but those at the ``quick`` positions, which the default run tries."""
    marks = pytest.mark.slow
    return [pytest.param(v, id=str(i), marks=() if i in quick else marks) for i, v in enumerate(values)]


def check_random_cases(
    strategy: st.SearchStrategy[Case], check: Callable[[Case], None], *, n: int, number: int
) -> None:
    """Draw ``n`` cases, different ones for every ``number``, and check each; a failure is shrunk to the smallest."""

    @seed(number)
    @settings(
        max_examples=n,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def check_all(case: Case) -> None:
        check(case)

    check_all()
