"""The numbers of the lesson ``hvp``."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from metalearn.lessons import Lesson, hvp
from tests.lessons.assertions import assert_checks, zero

MODES = ("forward_over_reverse", "reverse_over_reverse", "reverse_over_forward")
WAYS = ("two lines", *(f"{mode}, {kind}" for mode in MODES for kind in ("Tensor", "dict")))

# f = w1^2 sin w2 at (1, pi/2), where sin w2 = 1 and cos w2 = 0:
#   gradient (2 w1 sin w2, w1^2 cos w2) = (2, 0)
#   H = [[2 sin w2, 2 w1 cos w2], [2 w1 cos w2, -w1^2 sin w2]] = diag(2, -1),   H (0.5, 1) = (2 * 0.5, -1 * 1)
EXPECTED: dict[str, Any] = {
    "gradient, entry 1": pytest.approx(2, abs=1e-12),
    "gradient, entry 2": zero(1e-12),
    "Hessian, entry 11": pytest.approx(2, abs=1e-12),
    "Hessian, entry 12": zero(1e-12),
    "Hessian, entry 21": zero(1e-12),
    "Hessian, entry 22": pytest.approx(-1, abs=1e-12),
    **{
        f"H v by {way}, entry {i}": pytest.approx(value, abs=1e-12)
        for way in WAYS
        for i, value in ((1, 1.0), (2, -1.0))
    },
    # 6 x at 1; forward mode needs a formula that the operation lacks
    "sum x^3 without a forward-mode formula, forward_over_reverse": "NotImplementedError",
    "sum x^3 without a forward-mode formula, reverse_over_reverse": 6.0,
    "sum x^3 without a forward-mode formula, reverse_over_forward": "NotImplementedError",
}


def test_checks(lesson: Lesson) -> None:
    assert_checks(lesson, EXPECTED)


def test_code_shows_the_two_lines(lesson: Lesson) -> None:
    assert "(grads,) = torch.autograd.grad(f(x), x, create_graph=True)" in lesson.code
    assert "(product,) = torch.autograd.grad(grads, x, grad_outputs=v)" in lesson.code


def test_two_lines_at_another_point() -> None:
    # at (2, 0): H = [[2 sin 0, 4 cos 0], [4 cos 0, -4 sin 0]] = [[0, 4], [4, 0]], so H (3, 5) = (20, 12)
    x = torch.tensor([2.0, 0.0], dtype=torch.float64, requires_grad=True)
    v = torch.tensor([3.0, 5.0], dtype=torch.float64)
    assert hvp.two_lines(x, v).tolist() == pytest.approx([20.0, 12.0], abs=1e-12)


def test_notes_list_every_mode(lesson: Lesson) -> None:
    assert "262,144 parameters" in lesson.notes[0]  # four layers of 256 x 256
    assert [note.partition(":")[0] for note in lesson.notes[1:]] == list(MODES)


def test_plot_shows_gradient_and_tangent(lesson: Lesson) -> None:
    _, along = lesson.plots["hvp"].axes
    curves = [np.asarray(line.get_xydata()) for line in along.get_lines()]
    first, first_tangent, second, second_tangent = curves
    # at t = 1/2, x = (1.25, pi/2 + 1/2): gradient (2.5 cos 1/2, -1.5625 sin 1/2); the tangents are 2 + t and 0 - t
    assert first[-1] == pytest.approx([0.5, 2.5 * math.cos(0.5)], rel=1e-6)
    assert first_tangent[-1] == pytest.approx([0.5, 2.5], rel=1e-6)
    assert second[-1] == pytest.approx([0.5, -1.5625 * math.sin(0.5)], rel=1e-6)
    assert second_tangent[-1] == pytest.approx([0.5, -0.5], rel=1e-6)
