"""The numbers of the lesson ``pinn``."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from metalearn.lessons import Lesson, pinn
from tests.lessons.assertions import assert_checks, zero

EXPECTED: dict[str, Any] = {
    "tanh: largest |u - sin x| on [0, 2 pi]": zero(1e-3),
    "tanh: largest |u'' + u|": zero(0.05),
    "tanh: largest |u'' - nth_derivative|": zero(1e-9),
    "ReLU: largest |u''|": 0.0,  # piecewise linear
    "ReLU: root mean square of u'' + u over that of u": pytest.approx(1, abs=1e-12),  # as u'' = 0
    "ReLU: largest |u - sin x| is above 0.5": "yes",
}


def test_checks(lesson: Lesson) -> None:
    assert_checks(lesson, EXPECTED)


def one_unit() -> dict[str, torch.Tensor]:
    """One unit in each layer, all weights 1, no biases: u = act(act(x))."""
    one = torch.ones(1, 1, dtype=torch.float64)
    return {"w1": one, "b1": torch.zeros(1).double(), "w2": one, "b2": torch.zeros(1).double(), "w3": one}


def test_derivatives_of_one_unit() -> None:
    # u = tanh(tanh x) at x = 0.5 with s = tanh x, t = tanh s:  u' = (1 - t^2)(1 - s^2),
    # u'' = -2 t u' (1 - s^2) - 2 s u'
    x = torch.tensor([0.5], dtype=torch.float64)
    s, t = np.tanh(0.5), np.tanh(np.tanh(0.5))
    first = (1 - t**2) * (1 - s**2)
    u, u_x, u_xx = pinn.with_derivatives(one_unit(), x, torch.tanh)
    assert u.item() == pytest.approx(t, rel=1e-14)
    assert u_x.item() == pytest.approx(first, rel=1e-14)
    assert u_xx.item() == pytest.approx(-2 * t * first * (1 - s**2) - 2 * s * first, rel=1e-13)


def test_equation_sums_residual_and_initial_conditions() -> None:
    # u = relu(relu(x)) = x for x > 0, so u'' + u = x; at the points 1 and 2: (1 + 4) / 2 + u(1)^2 + (u'(1) - 1)^2
    x = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert pinn.equation(one_unit(), x, torch.relu).item() == pytest.approx(2.5 + 1 + 0)
    halved = one_unit() | {"w3": torch.tensor([[0.5]], dtype=torch.float64)}  # u = x/2
    assert pinn.equation(halved, x, torch.relu).item() == pytest.approx(2.5 / 4 + 0.25 + 0.25)


def test_solution_satisfies_the_boundary(lesson: Lesson) -> None:
    solution, error = lesson.plots["pinn"].axes
    sine, smooth, kinked = (np.asarray(line.get_xydata()) for line in solution.get_lines())
    assert sine[[0, 500, -1], 0] == pytest.approx([0, np.pi, 2 * np.pi])
    assert smooth[:, 1] == pytest.approx(np.sin(smooth[:, 0]), abs=1e-3)
    assert np.abs(np.diff(kinked[:, 1], 2)).max() > 0  # it has kinks, between which it is straight
    assert (np.abs(np.diff(kinked[:, 1], 2)) < 1e-9).mean() > 0.9
    assert error.get_yscale() == "log"


def test_notes_give_both_losses(lesson: Lesson) -> None:
    smooth, kinked = lesson.notes
    assert smooth.startswith("tanh: loss ")
    assert kinked.startswith("ReLU: loss ")
