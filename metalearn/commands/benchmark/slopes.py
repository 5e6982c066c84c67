"""How cost grows: the exponent p of cost = c x^p, by least squares on the logarithms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class SweepSeries:
    """A contender's cost along a sweep.

    Args:
        name: of the contender.
        values: what was swept over.
        median_ms: of a meta-gradient at each value.
        quartiles_ms: of the rounds at each value.
        peak_mib: memory at each value.
        slope_ms: exponent with which time grows.
        slope_mib: exponent with which memory grows.
    """

    name: str
    values: tuple[int, ...]
    median_ms: tuple[float, ...]
    quartiles_ms: tuple[tuple[float, float], ...]
    peak_mib: tuple[float, ...]
    slope_ms: float
    slope_mib: float


def log_log_slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The slope of log y over log x.

    Args:
        x: at least two different positive numbers.
        y: as many positive numbers.

    Raises:
        ValueError: if there is no such line.

    Example:
        >>> round(log_log_slope([1, 2, 4], [3, 12, 48]), 12)
        2.0
    """
    if len(set(x)) < 2 or min(*x, *y) <= 0:
        raise ValueError(f"log_log_slope: {x=}, {y=}; give two or more different x, and only positive numbers.")
    log_x, log_y = [math.log(value) for value in x], [math.log(value) for value in y]
    mean_x, mean_y = sum(log_x) / len(log_x), sum(log_y) / len(log_y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(log_x, log_y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in log_x)
