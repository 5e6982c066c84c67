"""What a fault of the suite is: how it is brought about, how often, and what must hold afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Attempt = Callable[[int, Path, Path], "dict[str, float] | None"]
"""``attempt(i, folder, shared)``: brings about the i-th case of a fault in ``folder``, an empty one of its own.

Raises ``AssertionError``, or whatever went wrong, if what must hold does not. ``shared`` is one folder for all attempts
of all rows, for what is made once. It may return figures that it has measured.
"""


@dataclass(frozen=True)
class Row:
    """A fault, and what must hold.

    Args:
        name: its key in ``faults.json``.
        fault: in words, as in the README's table.
        must_hold: in words.
        tries: how many attempts there are, numbered from 0.
        attempt: makes one.
        short: the attempts that ``make test`` makes; numbers from ``tries`` on are lighter ones, made there alone.
        cases: how many cases an attempt tries, where it is more than one.
        limits: what figures that are measured may be at most; held in the full run only, as no test is timed.
        seconds: about how long an attempt takes, for the time that is left.
    """

    name: str
    fault: str
    must_hold: str
    tries: int
    attempt: Attempt
    short: Sequence[int]
    cases: int = 1
    seconds: float = 1.0
    limits: Mapping[str, float] = field(default_factory=dict)


def outcome(row: Row, tries: Sequence[int], folder: Path, *, done: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Make the attempts, and count in how many of them everything held.

    Args:
        row: what to try.
        tries: numbers of the attempts.
        folder: an empty one; each attempt has one of its own in it.
        done: called after each attempt.

    Returns:
        ``tries``, ``held``, ``seconds``, a line for every attempt in which something did not hold, and ``measured``.
    """
    shared = folder / "shared"
    shared.mkdir(exist_ok=True)
    started = time.perf_counter()
    failures = []
    measured: dict[str, float] = {}
    for i in tries:
        own = folder / row.name / str(i)
        own.mkdir(parents=True)
        try:
            figures = row.attempt(i, own, shared) or {}
            measured = {**measured, **{n: max(value, measured.get(n, value)) for n, value in figures.items()}}
            for name, most in row.limits.items():
                assert figures[name] < most, f"{name} is {figures[name]:.3g} and must be below {most:g}"
        except Exception as error:  # whatever it is, it counts, and the other attempts go on
            failures.append(f"{i}: {type(error).__name__}: {str(error).strip()[:500]}")
        done()
    return {
        "tries": len(tries) * row.cases,
        "held": (len(tries) - len(failures)) * row.cases,
        "seconds": round(time.perf_counter() - started, 1),
        "failures": failures,
        **({"measured": measured} if measured else {}),
    }
