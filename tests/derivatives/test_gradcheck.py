"""The sweep of differences accepts correct gradients and rejects wrong ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from metalearn.derivatives.gradcheck import DirectionalCheck, directional

DOUBLE = torch.float64
ONE = torch.ones(1, dtype=DOUBLE)


def cube(x: Tensor) -> Tensor:
    return x.pow(3).sum()


def test_errors_fall_then_rise_with_smaller_steps() -> None:
    # Central differences of x^3: the error is h^2 f'''/6 = h^2, relative to f' = 3, and eps / h from rounding.
    check = directional(cube, ONE, ONE)
    assert check.analytic == 3
    for h, error in list(zip(check.steps, check.errors, strict=True))[:3]:
        assert error == pytest.approx(h * h / 3, rel=1e-3)
    assert check.errors[-1] > 100 * min(check.errors)
    assert check.error < 1e-8


def test_wrong_gradient_has_large_error() -> None:
    x = torch.randn(5, dtype=DOUBLE)
    right = 3 * x**2
    assert directional(cube, x, gradient_at_x=right).error < 1e-8
    assert directional(cube, x, gradient_at_x=right * (1 + 1e-5)).error > 1e-6
    assert directional(cube, x, gradient_at_x=-right).error > 1


def test_error_of_wrong_gradient_is_large_despite_one_lucky_step() -> None:
    # The difference at h = 0.1 is 3 + 0.01: a gradient of 3.01 is met there exactly, and nowhere else.
    check = directional(cube, ONE, ONE, gradient_at_x=3.01 * ONE)
    assert min(check.errors) < 1e-12
    assert check.error > 1e-3


def test_dictionary_and_random_direction() -> None:
    x = {"a": torch.randn(2, 2, dtype=DOUBLE), "b": torch.randn(3, dtype=DOUBLE)}
    first, again = (directional(lambda p: (p["a"].sum() * p["b"]).sin().sum(), x) for _ in range(2))
    assert first == again, "the direction is drawn from the seed"
    assert first.error < 1e-8


def test_direction_with_zero_slope() -> None:
    check = directional(cube, torch.tensor([1.0, 1.0], dtype=DOUBLE), torch.tensor([1.0, -1.0], dtype=DOUBLE))
    assert check.analytic == 0
    assert check.scale == 3
    assert check.error < 1e-8


ONES, X = torch.ones(2, dtype=DOUBLE), {"a": torch.ones(2, dtype=DOUBLE), "b": torch.ones(3, dtype=DOUBLE)}


@pytest.mark.parametrize(
    ("x", "settings", "message"),
    [
        (ONES, {"steps": [1e-3]}, "give at least two positive step sizes"),
        (ONES, {"steps": [1e-3, 0.0]}, "give at least two positive step sizes"),
        (ONES, {"v": 0 * ONES}, "the direction v has length zero"),
        (ONES, {"v": ONES[0]}, "v must be shaped like x"),
        (X, {"gradient_at_x": {"a": ONES}}, "gradient_at_x must be shaped like x"),
    ],
)
def test_directional_raises_on_bad_arguments(x: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        directional(cube, x, **settings)


def test_error_is_infinite_where_difference_is_nan() -> None:
    check = DirectionalCheck(1.0, (0.1, 0.01, 0.001), (1.0, float("nan"), 1.5), scale=1.0)
    assert check.error == float("inf")
    outside = directional(lambda x: x.log().sum(), torch.tensor([0.02], dtype=DOUBLE))  # h = 0.1 leaves the domain
    assert outside.error < 1e-7


def test_gradient_may_have_another_order() -> None:
    gradient = {"b": torch.full((3,), 3.0, dtype=DOUBLE), "a": torch.full((2,), 2.0, dtype=DOUBLE)}
    check = directional(lambda p: (p["a"] ** 2).sum() + (p["b"] ** 3).sum(), X, gradient_at_x=gradient)
    assert check.error < 1e-8


def test_error_needs_two_neighbouring_steps() -> None:
    check = DirectionalCheck(1.0, (0.1, 0.01, 0.001, 0.0001), (1.5, 1.0, 1.2, 1.1), scale=1.0)
    assert check.error == pytest.approx(0.2)
