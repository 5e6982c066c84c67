"""Intervals over seeds and tasks.

A seed draws its own parameters, training tasks and test tasks, so the means of n seeds are n independent values, and

    mean +- t(0.975, n - 1) s / sqrt(n)

covers the choice of both seeds and tasks. A few seeds may agree by chance, so the interval is never narrower than the
one over the test tasks, which is the only one that a single seed has.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch
from scipy.stats import t

from metalearn.training.evaluation import MeanCI


def seed_ci(means: Sequence[float], tasks_ci95: Sequence[float]) -> MeanCI:
    """Return the mean over seeds with its 95% interval; ``tasks_ci95`` are each seed's half-widths over its tasks."""
    n = len(means)
    between = float(t.ppf(0.975, n - 1)) * statistics.stdev(means) / math.sqrt(n) if n > 1 else 0.0
    return MeanCI(statistics.fmean(means), max(between, task_ci(tasks_ci95)))


def task_ci(tasks_ci95: Sequence[float]) -> float:
    """Return the half-width of a mean's interval over the tasks of these seeds, without the variation among seeds."""
    return math.hypot(*tasks_ci95) / len(tasks_ci95)


def difference(
    first: Sequence[Sequence[float]], other: Sequence[Sequence[float]], *, paired: bool
) -> tuple[MeanCI, list[float]]:
    """Return the mean of ``first - other`` with its 95% interval, and the difference of every seed.

    Both hold the accuracy of every test task, for every seed; ``paired`` tasks are the same one by one.
    """
    means = [statistics.fmean(a) - statistics.fmean(b) for a, b in zip(first, other, strict=True)]
    halves = []
    for tasks in zip(first, other, strict=True):
        a, b = (torch.tensor(accuracies, dtype=torch.float64) for accuracies in tasks)
        halves.append(MeanCI.of(a - b).ci95 if paired else math.hypot(MeanCI.of(a).ci95, MeanCI.of(b).ci95))
    return seed_ci(means, halves), means
