"""The numbers of the lesson ``maml``; the network's Hessian term also against differences in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from metalearn.lessons import Lesson, maml
from tests.lessons.assertions import assert_checks, zero

Vector = NDArray[np.float64]

# The line theta x from theta = 1: support (1, 3), so g = 2 (theta - 3), H = 2; query (2, 5), so dL = 4 (2 theta - 5).
EXPECTED: dict[str, Any] = {
    "line, alpha = 0.1, K = 1: first order": pytest.approx(-8.8),  # theta' = 1 + 0.1 * 4 = 1.4; 4 (2.8 - 5)
    "line, alpha = 0.1, K = 1: second order": pytest.approx(-7.04),  # times 1 - 0.1 * 2
    "line, alpha = 0.1, K = 3: first order": pytest.approx(-4.192),  # 1.4, 1.72, 1.976; 4 (3.952 - 5)
    "line, alpha = 0.1, K = 3: second order": pytest.approx(-2.146304),  # times 0.8^3
    "line, alpha = 0.6, K = 1: first order": pytest.approx(7.2),  # theta' = 3.4; 4 (6.8 - 5)
    "line, alpha = 0.6, K = 1: second order": pytest.approx(-1.44),  # times 1 - 0.6 * 2 = -0.2: the other way
    "first order against dL_query(theta'), relative": zero(1e-12),
    "length of the Hessian term, second - first": "by differences, below",
    "second - first against -alpha H g, relative": zero(1e-10),
    "H against its transpose, relative": zero(1e-12),
    "K = 3: first order against g, relative": zero(1e-12),
    "second order against (I - alpha H_0)(I - alpha H_1)(I - alpha H_2) g, relative": zero(1e-10),
    "error of second order along a direction, relative": zero(1e-8),
    "first order is wrong there by more than 1%": "True",
    "K = 3: gap / alpha at alpha = 1e-5, against 3 |H g| / |g|": "by differences, below",
    "K = 3: power of alpha that the gap grows with": pytest.approx(1, abs=0.01),
}


def gradient(theta: Vector, x: Vector, y: Vector) -> Vector:
    """Return the gradient of the mean squared error of the tanh network with 4 hidden units, by hand."""
    w1, b1, w2, b2 = theta[:4], theta[4:8], theta[8:12], theta[12]
    h = np.tanh(x[:, None] * w1 + b1)
    residual = 2 * (h @ w2 + b2 - y) / len(x)
    slope = residual[:, None] * w2 * (1 - h**2)
    return np.concatenate([x @ slope, slope.sum(0), residual @ h, [residual.sum()]])


def support_and_query() -> tuple[Vector, Vector, Vector, Vector, Vector]:
    episode = maml.SINE
    tensors = episode.support_x, episode.support_y, episode.query_x, episode.query_y
    return (maml.THETA.numpy(), *(t[0].numpy() for t in tensors))  # type: ignore[return-value]  # four of them


def hessian_times(v: Vector) -> Vector:
    """Return H v of the support loss at theta, from central differences of the gradient by hand."""
    theta, x, y, _, _ = support_and_query()
    h = 1e-5
    return (gradient(theta + h * v, x, y) - gradient(theta - h * v, x, y)) / (2 * h)


def hessian_term() -> float:
    """Return |alpha H dL_query(theta')|."""
    theta, x, y, query_x, query_y = support_and_query()
    g = gradient(theta - 0.1 * gradient(theta, x, y), query_x, query_y)
    return float(np.linalg.norm(0.1 * hessian_times(g)))


def gap_per_alpha() -> float:
    """Return 3 |H g| / |g|, as every H_k and g tend to those at theta when alpha tends to 0."""
    theta, _, _, query_x, query_y = support_and_query()
    g = gradient(theta, query_x, query_y)
    return float(3 * np.linalg.norm(hessian_times(g)) / np.linalg.norm(g))


def test_checks(lesson: Lesson) -> None:
    by_differences = {
        "length of the Hessian term, second - first": pytest.approx(hessian_term(), rel=1e-7),
        "K = 3: gap / alpha at alpha = 1e-5, against 3 |H g| / |g|": pytest.approx(gap_per_alpha(), rel=1e-3),
    }
    assert_checks(lesson, EXPECTED | by_differences)


def test_plot_shows_the_hessian_term(lesson: Lesson) -> None:
    term, gap, cosine = lesson.plots["hessian_term"].axes
    assert len(term.patches) == len(maml.THETA) == 13
    (points,) = [line for line in term.get_lines() if line.get_marker() == "o"]
    heights = [bar.get_height() for bar in term.patches if hasattr(bar, "get_height")]
    np.testing.assert_allclose(np.asarray(points.get_ydata(), float), heights, rtol=1e-9, atol=1e-12)
    assert [len(axes.get_lines()) for axes in (gap, cosine)] == [3, 3]
