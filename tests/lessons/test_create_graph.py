"""The numbers of the lesson ``create_graph``."""

from __future__ import annotations

from typing import Any

import torch

from metalearn.lessons import Lesson, create_graph
from tests.lessons.assertions import assert_checks, zero

EXPECTED: dict[str, Any] = {
    "dy/dx of x^2 at 3": 6.0,  # 2 x
    "d2y/dx2 of x^2, create_graph=True": 2.0,
    "d2y/dx2 of x^2, create_graph=False": "RuntimeError",  # "does not require grad"
    "d2y/dx2 of x^2, retain_graph=True instead": "RuntimeError",
    "d2y/dx2 of x^2, dy/dx detached": "RuntimeError",
    "d/dx of x^3 + (dy/dx)^2, create_graph=True": 51.0,  # x^3 + (2 x)^2: 3 x^2 + 8 x = 27 + 24
    "d/dx of x^3 + (dy/dx)^2, create_graph=False": 27.0,  # x^3 + a constant: 3 x^2
    "d/dx of x^3 + (dy/dx)^2, dy/dx detached": 27.0,
    "largest |d2y/dx2| of a ReLU network in its input": 0.0,  # linear between its kinks
    "tanh network: largest error of d2y/dx2": zero(1e-12),
    "y = w2 relu(3 w1) at w = (2, 5): d2y/dw1 dw1": 0.0,  # 3 w1 w2 is linear in w1,
    "y = w2 relu(3 w1) at w = (2, 5): d2y/dw1 dw2": 3.0,  # and bilinear in both
    "loss (y - 29)^2: d2/dw1 dw1": 450.0,  # 2 (dy/dw1)^2 = 2 (3 * 5)^2
    "loss (y - 29)^2: d2/dw1 dw2": 186.0,  # 2 dy/dw1 dy/dw2 + 2 (y - 29) 3 = 2 * 15 * 6 + 2 * 1 * 3
    "5 x: second call": "RuntimeError",
    "5 x, materialize_grads=True": "RuntimeError",
    "w x, w a leaf: second call": "RuntimeError",
    "w x, allow_unused=True": "None",
    "w x, materialize_grads=True": 0.0,
    "5 x: metalearn.derivatives.hessian": 0.0,
}


def test_checks(lesson: Lesson) -> None:
    assert_checks(lesson, EXPECTED)


def test_the_two_errors_differ(lesson: Lesson) -> None:
    no_graph, misses_x = lesson.notes
    assert "does not require grad" in no_graph
    assert "appears to not have been used in the graph" in misses_x


def test_relu_network_has_kinks_inside_the_plot() -> None:
    # Its first derivative is a staircase with a step a kink: zero curvature does not come from a straight line.
    slope = create_graph.in_the_input(torch.nn.ReLU(), create_graph.GRID)[1]
    assert len({round(value, 9) for value in slope.tolist()}) == len(create_graph.KINKS) + 1
