"""The numbers of the lesson ``newton``."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from metalearn.lessons import Lesson, newton
from tests.lessons.assertions import assert_checks, zero

EXPECTED: dict[str, Any] = {
    "Newton-CG: distance from (1, ..., 1)": zero(1e-8),
    "Newton-CG: value of f": zero(1e-15),
    "Newton-CG: |g_k+1| / |g_k| falls in each of the last three steps": "yes",
    "Newton-CG: the last two of these are below 0.1": "yes",
    "gradient descent, same budget: within 0.1 of (1, ..., 1)": "no",
}


def test_checks(lesson: Lesson) -> None:
    assert_checks(lesson, EXPECTED)


def test_newton_direction_solves_definite_system() -> None:
    # a short gradient asks for |r| <= |g|^1.5: 1e-12 of it here, so that p is -H^-1 g
    draw = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, dtype=torch.float64, generator=draw)
    h, grad = root @ root.T + torch.eye(6), 1e-24 * torch.randn(6, dtype=torch.float64, generator=draw)
    p, products = newton.newton_direction(lambda v: h @ v, grad)
    torch.testing.assert_close(p, -torch.linalg.solve(h, grad), rtol=1e-9, atol=0)
    assert products <= 12


def test_newton_direction_stops_early_with_long_gradient() -> None:
    # |g| >= 1/4 asks for |r| <= |g| / 2 alone, which one product reaches where H is a multiple of the identity
    p, products = newton.newton_direction(lambda v: 2 * v, torch.tensor([3.0, 4.0]))
    assert products == 1
    assert p.tolist() == pytest.approx([-1.5, -2.0])


def test_newton_direction_stops_at_negative_curvature() -> None:
    # the first direction is -g, and g'Hg = 1 - 9 < 0; with diag(1, -0.01) it is 1 - 0.09 > 0, and the second one bends
    grad = torch.tensor([1.0, 3.0], dtype=torch.float64)
    p, products = newton.newton_direction(lambda v: v * torch.tensor([1.0, -1.0], dtype=torch.float64), grad)
    assert (p.tolist(), products) == ([-1.0, -3.0], 1)
    p, products = newton.newton_direction(lambda v: v * torch.tensor([1.0, -0.01], dtype=torch.float64), grad)
    assert products == 2
    assert p.tolist() == pytest.approx([-10 / 0.91, -30 / 0.91])  # -g g'g / g'Hg
    assert p.dot(grad) < 0


def test_backtrack_halves_the_step() -> None:
    # x^2 from 1 along -8: at step 1, 1/2 and 1/4 the points are -7, -3 and -1, not below; 1/8 leads to 0
    x, p = torch.tensor([1.0]), torch.tensor([-8.0])
    step, values = newton.backtrack(lambda x: x.square().sum(), x, p, grad=torch.tensor([2.0]))
    assert (step, values) == (0.125, 5)  # f(x), and four more


def test_last_steps_are_superlinear(lesson: Lesson) -> None:
    path = newton.newton_cg(newton.rosenbrock, torch.zeros(10, dtype=torch.float64))
    norms = [i.norm for i in path]
    assert 20 < len(path) < 120
    # theorem 7.2: |g_k+1| is of the order of |g_k|^(3/2), so the third last to the second last at most some times that
    assert norms[-2] < 20 * norms[-3] ** 1.5
    assert norms[-1] < 1e-9
    assert f"{len(path) - 1} steps, {path[-1].cost} gradients" in lesson.notes[0]


def test_newton_cg_counts_costs() -> None:
    # |x|^2: the first direction is exact, with one product (3); f at x and at x + p (2); the gradient there (1)
    path = newton.newton_cg(lambda x: x.square().sum() / 2, torch.tensor([3.0, 4.0], dtype=torch.float64))
    assert [i.cost for i in path] == [1, 7]
    assert path[-1].norm == 0


def test_curvatures_in_the_notes() -> None:
    # at (1, ..., 1): 1200 x_i^2 - 400 x_i+1 + 2 = 802 first, 200 last, 1002 between; -400 x_i beside it
    h = np.diag([802.0, *[1002.0] * 8, 200.0]) + np.diag([-400.0] * 9, 1) + np.diag([-400.0] * 9, -1)
    values = np.linalg.eigvalsh(h)
    assert values[[0, -1]] == pytest.approx([0.499, 1762.8], rel=1e-3)
    assert values[-1] / values[0] == pytest.approx(3500, rel=0.02)  # the claim's factor
    assert 2 / values[-1] == pytest.approx(1.1e-3, rel=0.05)
    found = torch.func.hessian(newton.rosenbrock)(torch.ones(10, dtype=torch.float64))
    np.testing.assert_allclose(found.numpy(), h, atol=1e-9)


def test_gradient_descent_uses_the_same_budget_and_its_best_step(lesson: Lesson) -> None:
    _, costs = lesson.plots["newton"].axes
    by_newton, by_descent = (np.asarray(line.get_xydata()) for line in costs.get_lines())
    assert by_descent[-1][0] == 10 * by_newton[-1][0]
    same = by_descent[int(by_newton[-1][0]) - 1]
    assert same[0] == by_newton[-1][0]
    assert same[1] > 0.1  # not there, by the gradient's length either
    assert by_newton[-1][1] < 1e-9
