"""Derivatives of any order against closed forms."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from metalearn.derivatives import nth_derivative

DOUBLE = torch.float64


@pytest.fixture(params=["reverse", "forward"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize(("order", "expected"), [(0, 8.0), (1, 12.0), (2, 12.0), (3, 6.0), (4, 0.0), (5, 0.0)])
def test_nth_derivative_of_a_cube(order: int, expected: float, mode: str) -> None:
    assert nth_derivative(lambda x: x**3, torch.tensor(2.0), order, mode=mode).item() == expected
    assert nth_derivative(lambda x: x * x * x, torch.tensor(2.0), order, mode=mode).item() == expected


def test_nth_derivative_at_input_that_requires_grad(mode: str) -> None:
    x = torch.tensor(2.0, requires_grad=True)
    with torch.no_grad():
        assert nth_derivative(lambda x: x**3, x, 2, mode=mode).item() == 12
    assert x.grad is None


def test_twelfth_derivative() -> None:
    # d^12 x^12 / dx^12 = 12!; nested forward mode would take most of a minute.
    got = nth_derivative(lambda x: x**12, torch.tensor(1.5, dtype=DOUBLE), 12)
    assert got.item() == pytest.approx(math.factorial(12))


def test_nth_derivative_at_every_entry(mode: str) -> None:
    # The n-th derivative of sin x is sin(x + n pi / 2).
    x = torch.linspace(-2, 2, 6, dtype=DOUBLE).reshape(2, 3)
    for order in range(6):
        torch.testing.assert_close(nth_derivative(torch.sin, x, order, mode=mode), torch.sin(x + order * math.pi / 2))


def test_nth_derivative_along_a_direction(mode: str) -> None:
    # f = a^2 b along (1, 2) from (1, 1): (1 + t)^2 (1 + 2t) = 1 + 4t + 5t^2 + 2t^3, so 1, 4, 10, 12, 0.
    x = {"a": torch.tensor(1.0), "b": torch.tensor(1.0)}
    v = {"a": torch.tensor(1.0), "b": torch.tensor(2.0)}
    got = [nth_derivative(lambda p: p["a"] ** 2 * p["b"], x, n, along=v, mode=mode).item() for n in range(5)]
    assert got == [1.0, 4.0, 10.0, 12.0, 0.0]


@pytest.mark.parametrize(
    ("f", "x", "order", "mode", "error", "message"),
    [
        (torch.sin, 1.0, -1, "reverse", ValueError, r"order=-1; it must be a whole number, 0 or more"),
        (torch.sin, 1.0, 1.0, "reverse", ValueError, r"order=1\.0"),
        (torch.sin, 1.0, 1, "jet", ValueError, r"mode='jet' is not one of reverse, forward"),
        (torch.sin, 1, 1, "reverse", TypeError, r"torch\.int64"),
        (lambda x: torch.stack([x, x]), 1.0, 1, "reverse", ValueError, r"to a tensor of shape \(2,\).*along=v"),
    ],
)
def test_nth_derivative_raises_on_bad_arguments(
    f: Any, x: float, order: Any, mode: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        nth_derivative(f, torch.tensor(x), order, mode=mode)
    with pytest.raises(ValueError, match=r"x is a dictionary; say along which direction"):
        nth_derivative(lambda p: p["a"], {"a": torch.tensor(1.0)}, 1)


def test_third_derivatives_wrong_in_torch_raise() -> None:
    x, w = torch.randn(4, 6, dtype=DOUBLE), torch.randn(4, 6, dtype=DOUBLE)

    def normalised(x: Tensor) -> Tensor:
        return (torch.nn.functional.layer_norm(x, (6,)) * w).tanh().sum()

    with pytest.raises(NotImplementedError, match=r"^layer_norm: .*third derivative.*mean and variance"):
        nth_derivative(normalised, x, 3, along=w)

    def product(x: Tensor) -> Tensor:
        return x[0].prod()

    with pytest.raises(NotImplementedError, match=r"^prod: .*mode='reverse'"):
        nth_derivative(product, x, 3, along=w, mode="forward")
    a, v = x[0], w[0]  # d^3 prod(a + t v) / dt^3 = 3! sum over triples of v of the product of the others
    triples = (v[list(c)].prod() * a[[i for i in range(6) if i not in c]].prod() for c in combinations(range(6), 3))
    torch.testing.assert_close(nth_derivative(product, x, 3, along=w), 6 * torch.stack(list(triples)).sum())
