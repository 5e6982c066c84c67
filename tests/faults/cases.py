"""Cases of a fault: those of ``make test`` and those of ``make faults``; and cases that hypothesis draws."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from typing import TYPE_CHECKING, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

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
