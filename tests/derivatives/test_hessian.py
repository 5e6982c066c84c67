"""The dense Hessian, derivatives of any order, and the spectrum, against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from metalearn.core.profiling.memory import PeakTensorMemory
from metalearn.derivatives import hessian, hessian_bytes, hvp, nth_derivative, top_eigenvalues

DOUBLE = torch.float64


def test_hessian_of_a_tensor_of_any_shape() -> None:
    # f = sum_ij x_ij^3 has d2f / dx_ij dx_kl = 6 x_ij where (i, j) = (k, l), else 0.
    x = torch.randn(2, 3, dtype=DOUBLE)
    expected = torch.diag(6 * x.flatten()).reshape(2, 3, 2, 3)
    torch.testing.assert_close(hessian(lambda x: x.pow(3).sum(), x), expected)


def test_hessian_of_a_dictionary() -> None:
    # f = a^2 sin b: aa 2 sin b, ab 2 a cos b, bb -a^2 sin b.
    a, b = torch.tensor(1.2, dtype=DOUBLE), torch.tensor(0.4, dtype=DOUBLE)
    got = hessian(lambda p: p["a"] ** 2 * torch.sin(p["b"]), {"a": a, "b": b})
    torch.testing.assert_close(got["a"]["a"], 2 * b.sin())
    torch.testing.assert_close(got["a"]["b"], 2 * a * b.cos())
    torch.testing.assert_close(got["b"]["a"], 2 * a * b.cos())
    torch.testing.assert_close(got["b"]["b"], -(a**2) * b.sin())


def test_hessian_holds_no_graph() -> None:
    a = torch.ones(2, requires_grad=True)
    assert not hessian(lambda x: (a * x**2).sum(), torch.ones(2, requires_grad=True)).requires_grad


def test_more_rows_than_are_taken_at_a_time() -> None:
    a = torch.randn(150, 150, dtype=DOUBLE)
    got = hessian(lambda x: x @ a @ x / 2, torch.randn(150, dtype=DOUBLE))
    torch.testing.assert_close(got, (a + a.T) / 2)


@pytest.mark.parametrize("n", [500, 1000])
def test_estimate_is_what_is_taken(n: int) -> None:
    x = torch.randn(n)
    with PeakTensorMemory() as live:
        hessian(lambda x: torch.tanh(x).pow(2).sum() * x.mean(), x)
    assert hessian_bytes(x) == 2 * n * n * 4
    assert 0.9 < live.peak / hessian_bytes(x) < 1.5


def test_a_hessian_that_does_not_fit_is_refused_before_it_starts() -> None:
    called = []

    def f(x: Tensor) -> Tensor:
        called.append(True)
        return x.sum()

    # 10^6 numbers: 10^12 entries of 4 bytes, twice: 8e12 bytes = 7.28 TiB.
    with pytest.raises(MemoryError, match=r"n = 1,000,000.*1,000,000,000,000 entries.*7\.28 TiB.*Use hvp\(f, x, v\)"):
        hessian(f, torch.zeros(10**6))
    with pytest.raises(MemoryError, match=r"about 780 KiB while it is computed, and 1 KiB may be used"):
        hessian(f, {"x": torch.zeros(316)}, memory_limit=1024)
    assert not called


@pytest.mark.parametrize("mode", ["reverse", "forward"])
@pytest.mark.parametrize(("order", "expected"), [(0, 8.0), (1, 12.0), (2, 12.0), (3, 6.0), (4, 0.0), (5, 0.0)])
def test_derivatives_of_a_cube(order: int, expected: float, mode: str) -> None:
    assert nth_derivative(lambda x: x**3, torch.tensor(2.0), order, mode=mode).item() == expected
    assert nth_derivative(lambda x: x * x * x, torch.tensor(2.0), order, mode=mode).item() == expected


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_derivatives_do_not_mind_a_point_that_requires_a_gradient(mode: str) -> None:
    x = torch.tensor(2.0, requires_grad=True)
    with torch.no_grad():
        assert nth_derivative(lambda x: x**3, x, 2, mode=mode).item() == 12
    assert x.grad is None


def test_a_high_order_is_quick_enough() -> None:
    # d^12 x^12 / dx^12 = 12!; nested forward mode would take most of a minute.
    got = nth_derivative(lambda x: x**12, torch.tensor(1.5, dtype=DOUBLE), 12)
    assert got.item() == pytest.approx(math.factorial(12))


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_derivatives_at_every_entry(mode: str) -> None:
    # The n-th derivative of sin x is sin(x + n pi / 2).
    x = torch.linspace(-2, 2, 6, dtype=DOUBLE).reshape(2, 3)
    for order in range(6):
        torch.testing.assert_close(nth_derivative(torch.sin, x, order, mode=mode), torch.sin(x + order * math.pi / 2))


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_derivatives_along_a_direction(mode: str) -> None:
    # f = a^2 b along (1, 2) from (1, 1): (1 + t)^2 (1 + 2t) = 1 + 4t + 5t^2 + 2t^3, so 1, 4, 10, 12, 0.
    x = {"a": torch.tensor(1.0), "b": torch.tensor(1.0)}
    v = {"a": torch.tensor(1.0), "b": torch.tensor(2.0)}
    got = [nth_derivative(lambda p: p["a"] ** 2 * p["b"], x, n, along=v, mode=mode).item() for n in range(5)]
    assert got == [1.0, 4.0, 10.0, 12.0, 0.0]


def test_nth_derivative_refuses() -> None:
    with pytest.raises(ValueError, match=r"order=-1; it must be a whole number, 0 or more"):
        nth_derivative(torch.sin, torch.tensor(1.0), -1)
    with pytest.raises(ValueError, match=r"order=1\.0"):
        nth_derivative(torch.sin, torch.tensor(1.0), 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"x is a dictionary; say along which direction"):
        nth_derivative(lambda p: p["a"], {"a": torch.tensor(1.0)}, 1)
    with pytest.raises(ValueError, match=r"maps one number to a tensor of shape \(2,\).*along=v"):
        nth_derivative(lambda x: torch.stack([x, x]), torch.tensor(1.0), 1)
    with pytest.raises(ValueError, match=r"mode='jet' is not one of reverse, forward"):
        nth_derivative(torch.sin, torch.tensor(1.0), 1, mode="jet")
    with pytest.raises(TypeError, match=r"torch\.int64"):
        nth_derivative(torch.sin, torch.tensor(1), 1)


@pytest.mark.parametrize("n", [5, 80])
@pytest.mark.parametrize("k", [1, 3])
def test_top_eigenvalues_of_a_known_spectrum(k: int, n: int) -> None:
    q = torch.linalg.qr(torch.randn(n, n, dtype=DOUBLE)).Q
    spectrum = torch.linspace(-9, 4, n, dtype=DOUBLE)  # the largest is not the largest in size
    a = q @ torch.diag(spectrum) @ q.T
    got = top_eigenvalues(lambda p: p["x"] @ a @ p["x"] / 2, {"x": torch.randn(n, dtype=DOUBLE)}, k, tol=1e-6)
    torch.testing.assert_close(got, spectrum.flip(0)[:k], rtol=1e-5, atol=1e-5)


def test_top_eigenvalues_in_bfloat16() -> None:
    a = torch.linspace(1, 3, 100)
    got = top_eigenvalues(lambda x: (a.to(x) * x * x).sum() / 2, torch.randn(100).bfloat16(), tol=0.02)
    assert got.item() == pytest.approx(3.0, rel=0.03)


def test_top_eigenvalues_refuses() -> None:
    x = torch.zeros(3)
    with pytest.raises(ValueError, match=r"k=4; it must be at least 1 and at most n = 3"):
        top_eigenvalues(lambda x: x.sum(), x, 4)
    with pytest.raises(ValueError, match=r"k=0"):
        top_eigenvalues(lambda x: x.sum(), x, 0)
    for n in (5, 100):
        with pytest.raises(ArithmeticError, match=r"product with the Hessian is not finite; look for NaN in f"):
            top_eigenvalues(lambda x: (x * math.nan).pow(2).sum(), torch.randn(n))


@pytest.mark.parametrize("n", [5, 100])
def test_a_linear_function_has_eigenvalues_zero(n: int) -> None:
    assert top_eigenvalues(lambda x: 3 * x.sum(), torch.randn(n), 2).tolist() == [0.0, 0.0]


def test_hessian_and_product_agree_on_a_network() -> None:
    w = torch.randn(4, 6, dtype=DOUBLE)

    def f(x: Tensor) -> Tensor:
        return torch.logsumexp(torch.tanh(w @ x), dim=0)

    x, v = torch.randn(6, dtype=DOUBLE), torch.randn(6, dtype=DOUBLE)
    torch.testing.assert_close(hessian(f, x) @ v, hvp(f, x, v))
