"""The numbers of the lesson ``finite_differences``."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from metalearn.lessons import Lesson, finite_differences
from metalearn.lessons.finite_differences import METHODS, STEPS
from tests.lessons.assertions import assert_checks, zero

# p, q and the best step in float64 and float32. On exp all derivatives are alike, so relative errors are
#   forward                  h/2    + 2 eps/h      least at h = 2 eps^(1/2)        3.0e-8   6.9e-4
#   central, of gradients    h^2/6  + eps/h        least at h = (3 eps)^(1/3)      8.7e-6   7.1e-3
#   second difference        h^2/12 + 4 eps/h^2    least at h = (48 eps)^(1/4)     3.2e-4   4.9e-2
NAMES = ("forward", "central", "second difference", "difference of gradients")
POWERS = {"forward": (1, 1), "central": (2, 1), "second difference": (2, 2), "difference of gradients": (2, 1)}
BEST = {
    "forward": (3.0e-8, 6.9e-4),
    "central": (8.7e-6, 7.1e-3),
    "second difference": (3.2e-4, 4.9e-2),
    "difference of gradients": (8.7e-6, 7.1e-3),
}

EXPECTED: dict[str, Any] = {}
for name in NAMES:
    for kind in ("float64", "float32"):
        EXPECTED[f"{name}, {kind}: log10 of the best step over the foreseen one"] = zero(1.0)
        EXPECTED[f"{name}, {kind}: log10 of the smallest error over the foreseen one"] = zero(1.0)
for name, (p, q) in POWERS.items():
    EXPECTED[f"{name}: p in error = c h^p, large steps"] = pytest.approx(p, abs=0.1)
    EXPECTED[f"{name}: p in error = c h^p, small steps"] = pytest.approx(-q, abs=0.3)
EXPECTED |= {
    "H v of log sum exp by difference of gradients: relative error": zero(1e-8),
    "H v of log sum exp by hvp: relative error": zero(1e-13),
    "x^2 at 1 in float32, step 1e-8: gives, for 2": 0.0,  # 1 + 1e-8 == 1 - 1e-8 == 1
    "x^2 at 1, both sides one tensor: gives, for 2": 0.0,
    "x^2 at 1, divided by h: gives, for 2": pytest.approx(4, abs=1e-9),  # twice the derivative
    "gradcheck of exp, float64": 1.0,
    "gradcheck of exp, float32": "GradcheckError",
    "gradcheck.directional of a right gradient: error": zero(1e-8),
    "gradcheck.directional of one 1% too long: error": pytest.approx(0.0099010, abs=1e-4),  # 0.01 / 1.01
}


def test_checks(lesson: Lesson) -> None:
    assert_checks(lesson, EXPECTED)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_predicted_best_steps(method: finite_differences.Method) -> None:
    eps = (2.220446049250313e-16, 1.1920928955078125e-07)
    assert [method.best(e) for e in eps] == pytest.approx(BEST[method.name], rel=0.02)
    assert (method.order, method.rounding) == POWERS[method.name]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_truncation_errors_equal_the_series(method: finite_differences.Method) -> None:
    # with f = exp and h = 0.1, relative to f: (e^h - 1)/h, sinh(h)/h, and 2 (cosh h - 1)/h^2, each less 1
    known = {
        "forward": (math.exp(0.1) - 1) / 0.1 - 1,
        "central": math.sinh(0.1) / 0.1 - 1,
        "second difference": 2 * (math.cosh(0.1) - 1) / 0.1**2 - 1,
        "difference of gradients": math.sinh(0.1) / 0.1 - 1,
    }
    curve = finite_differences.errors(method, torch.float64)
    at = min(range(len(STEPS)), key=lambda i: abs(STEPS[i] - 0.1))
    assert STEPS[at] == pytest.approx(0.1)
    assert curve[at] == pytest.approx(known[method.name], rel=1e-6)


def test_difference_of_gradients_beats_second_difference(lesson: Lesson) -> None:
    # the smallest errors foreseen in float64 are eps^(2/3) = 4e-11 and eps^(1/2) = 1.5e-8
    smallest = {m.name: min(finite_differences.errors(m, torch.float64)) for m in METHODS}
    assert smallest["difference of gradients"] < smallest["second difference"] / 50
    assert lesson.passed


def test_plot_marks_the_best_steps(lesson: Lesson) -> None:
    for axes in lesson.plots["finite_differences"].axes:
        lines = [np.asarray(line.get_xydata()) for line in axes.get_lines()]
        assert len(lines) == 8
        for curve, mark in zip(lines[::2], lines[1::2], strict=True):
            assert mark[0].tolist() == curve[curve[:, 1].argmin()].tolist()
