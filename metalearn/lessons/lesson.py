"""The parts of a lesson: a claim, the code that tests it, computed and expected numbers, notes and plots."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

BLUE, GREEN, VERMILION, GREY = "#0072B2", "#009E73", "#D55E00", "#777777"
"""Colours that colour-blind readers can tell apart (Okabe & Ito 2008)."""


@dataclass(frozen=True)
class Check:
    """A number that a lesson computed, and its expected value."""

    name: str  # of the quantity, in mathematics or words
    computed: float | str  # the number, or a word such as the name of an error
    expected: float | str
    tolerance: float = 0.0  # largest absolute difference; 0 for words and whole numbers
    source: str = "analytic"  # of the expected value

    @property
    def passed(self) -> bool:
        """True if computed and expected agree."""
        if isinstance(self.computed, str) or isinstance(self.expected, str):
            return self.computed == self.expected
        return abs(self.computed - self.expected) <= self.tolerance


@dataclass(frozen=True)
class Lesson:
    """The result of a lesson."""

    title: str
    claim: str  # what the lesson shows, and which common mistake it corrects, in a few sentences
    code: str  # the important lines, as they ran (see ``source_of``)
    checks: list[Check]
    notes: list[str] = field(default_factory=list)  # measurements without an expected value (seconds, bytes)
    plots: dict[str, Figure] = field(default_factory=dict)  # by file name without extension

    @property
    def passed(self) -> bool:
        """True if every check passed, and there is at least one."""
        return bool(self.checks) and all(check.passed for check in self.checks)


def source_of(*functions: Callable[..., Any]) -> str:
    """Return the source of functions without their docstrings: the code shown is the code that ran."""
    sources = []
    for f in functions:
        source = textwrap.dedent(inspect.getsource(f))
        if f.__doc__ is not None:
            head, _, rest = source.partition('"""')
            source = head.rstrip() + "\n" + rest.partition('"""')[2].lstrip("\n")
        sources.append(source.rstrip())
    return "\n\n".join(sources)


def value_or_error(compute: Callable[[], Tensor | None]) -> float | str:
    """Return the computed number, ``"None"``, or the name of the error that was raised."""
    try:
        value = compute()
    except Exception as error:  # of any kind: the error is the result
        return type(error).__name__
    return "None" if value is None else value.item()


def error_message(compute: Callable[[], object]) -> str:
    """Return the error that a computation raises, as ``Name: first sentence``."""
    try:
        compute()
    except Exception as error:  # of any kind: the error is the result
        return f"{type(error).__name__}: {str(error).partition('. ')[0]}"
    return "no error"


def yes_or_no(fact: bool) -> str:
    """Return the word for a check."""
    return "yes" if fact else "no"


def leaf(value: float) -> Tensor:
    """Return a float64 number that requires a gradient."""
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def panels(
    columns: int, *, width: float, height: float, shares: Sequence[float] | None = None
) -> tuple[Figure, list[Axes]]:
    """Return a figure, sized in inches, and its panels from left to right, with relative widths ``shares``.

    It is made without pyplot, which keeps every figure in a global list.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False, width_ratios=shares)
    return figure, list(np.asarray(axes).flat)
