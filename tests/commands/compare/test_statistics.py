"""Intervals against tables of Student's t, and their coverage in a simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from metalearn.commands.compare.statistics import difference, seed_ci, task_ci


def test_seed_ci_equals_students_t() -> None:
    # means 0.90, 0.92, 0.94: s = 0.02, t(0.975, 2) = 4.302653 (any table), half-width 4.302653 * 0.02 / sqrt(3)
    estimate = seed_ci([0.90, 0.92, 0.94], [0.01, 0.01, 0.01])
    assert estimate.mean == pytest.approx(0.92)
    assert estimate.ci95 == pytest.approx(4.302653 * 0.02 / math.sqrt(3), rel=1e-6)


def test_seed_ci_is_over_tasks_when_one_seed() -> None:
    estimate = seed_ci([0.9], [0.01])
    assert (estimate.mean, estimate.ci95) == (0.9, 0.01)


def test_seed_ci_is_never_narrower_than_over_tasks() -> None:
    assert seed_ci([0.9, 0.9, 0.9], [0.03, 0.03, 0.03]).ci95 == pytest.approx(0.03 / math.sqrt(3))
    tasks = [0.4, 0.6, 0.2, 0.8]
    estimate, _ = difference([tasks, tasks], [list(reversed(tasks)), list(reversed(tasks))], paired=True)
    assert estimate.mean == 0
    assert estimate.ci95 > 0.1


def test_task_ci_shrinks_with_seeds() -> None:
    assert task_ci([0.03]) == pytest.approx(0.03)
    assert task_ci([0.03] * 4) == pytest.approx(0.015)


def test_difference_is_narrower_when_paired() -> None:
    easy_and_hard = [0.2, 0.9, 0.4, 1.0]
    better = [x + d for x, d in zip(easy_and_hard, [0.05, 0.03, 0.05, 0.03], strict=True)]
    paired, per_seed = difference([better], [easy_and_hard], paired=True)
    apart, _ = difference([better], [easy_and_hard], paired=False)
    assert per_seed == pytest.approx([0.04])
    # s of the four differences is 0.02 / sqrt(3)
    assert paired.ci95 == pytest.approx(1.96 * 0.02 / math.sqrt(3) / 2)
    assert apart.mean == pytest.approx(paired.mean)
    assert apart.ci95 > 20 * paired.ci95


def test_difference_covers_truth_in_95_percent() -> None:
    # The truth is 0.1; a seed moves it by 0.02, a task by 0.2. Of 2,000 comparisons of 3 seeds 95% must cover it.
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        shifts = 0.1 + 0.02 * generator.standard_normal(3)
        first = [(s + 0.2 * generator.standard_normal(50)).tolist() for s in shifts]
        estimate, _ = difference(first, [[0.0] * 50] * 3, paired=True)
        covered += abs(estimate.mean - 0.1) <= estimate.ci95
    assert 0.935 < covered / 2000 < 0.985, "a little more than 95%, as it is never below that over tasks"
