"""What a lesson is: a claim, the code that tests it, what came out beside what is known, and pictures."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from matplotlib.figure import Figure


@dataclass(frozen=True)
class Check:
    """One number that a lesson computed, beside what it must be.

    Args:
        what: what was computed, in mathematics or words.
        computed: the number, or a word such as the name of an error.
        expected: its analytic value.
        tolerance: largest absolute difference; 0 for words and whole numbers.
        source: where the expected value comes from: ``"analytic"``, or what else it was held against.
    """

    what: str
    computed: float | str
    expected: float | str
    tolerance: float = 0.0
    source: str = "analytic"

    @property
    def right(self) -> bool:
        """Whether computed and expected agree."""
        if isinstance(self.computed, str) or isinstance(self.expected, str):
            return self.computed == self.expected
        return abs(self.computed - self.expected) <= self.tolerance


@dataclass(frozen=True)
class Lesson:
    """The outcome of a lesson.

    Args:
        title: one line.
        claim: what is shown, and where it corrects what is commonly written, a few sentences.
        code: the few lines that matter, as they ran (``source_of`` takes them from the functions themselves).
        checks: every number, with its verdict.
        notes: measured figures without an analytic value (seconds, bytes), a line each.
        plots: pictures by file name, without its ending.
    """

    title: str
    claim: str
    code: str
    checks: list[Check]
    notes: list[str] = field(default_factory=list)
    plots: dict[str, Figure] = field(default_factory=dict)

    @property
    def right(self) -> bool:
        """The verdict: every check is right, and there is at least one."""
        return bool(self.checks) and all(check.right for check in self.checks)


def source_of(*functions: Callable[..., Any]) -> str:
    """The functions' own source, without docstrings: what is shown is what ran."""
    return "\n\n".join(_without_docstring(textwrap.dedent(inspect.getsource(f)), f.__doc__) for f in functions)


def _without_docstring(source: str, docstring: str | None) -> str:
    if docstring is None:
        return source.rstrip()
    head, _, rest = source.partition('"""')
    return (head.rstrip() + "\n" + rest.partition('"""')[2].lstrip("\n")).rstrip()
