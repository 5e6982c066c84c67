"""The dense Hessian and its largest eigenvalues against closed forms and known spectra."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from metalearn.core.profiling.memory import PeakTensorMemory
from metalearn.derivatives import hessian, hessian_bytes, top_eigenvalues

DOUBLE = torch.float64


def test_hessian_of_a_matrix() -> None:
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


def test_hessian_is_detached() -> None:
    a = torch.ones(2, requires_grad=True)
    assert not hessian(lambda x: (a * x**2).sum(), torch.ones(2, requires_grad=True)).requires_grad


def test_hessian_of_more_rows_than_one_chunk() -> None:
    a = torch.randn(150, 150, dtype=DOUBLE)
    got = hessian(lambda x: x @ a @ x / 2, torch.randn(150, dtype=DOUBLE))
    torch.testing.assert_close(got, (a + a.T) / 2)


@pytest.mark.parametrize("n", [500, 1000])
def test_hessian_bytes_equals_measured_peak(n: int) -> None:
    x = torch.randn(n)
    with PeakTensorMemory() as live:
        hessian(lambda x: torch.tanh(x).pow(2).sum() * x.mean(), x)
    assert hessian_bytes(x) == 2 * n * n * 4
    assert 0.9 < live.peak / hessian_bytes(x) < 1.5


def test_hessian_raises_before_computing_if_it_does_not_fit() -> None:
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


def test_hessian_of_masked_select_raises() -> None:
    x, mask = torch.randn(5, dtype=DOUBLE), torch.tensor([True, False, True, True, False])
    with pytest.raises(NotImplementedError, match=r"^masked_select: .*x\[mask\]"):
        hessian(lambda x: x.masked_select(mask).pow(3).sum(), x)
    got = hessian(lambda x: x[mask].pow(3).sum(), x)
    torch.testing.assert_close(got, torch.diag(6 * x * mask))


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


@pytest.mark.parametrize(("k", "match"), [(4, "k=4; it must be at least 1 and at most n = 3"), (0, "k=0")])
def test_top_eigenvalues_raises_on_bad_k(k: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        top_eigenvalues(lambda x: x.sum(), torch.zeros(3), k)


@pytest.mark.parametrize("n", [5, 100])
def test_top_eigenvalues_raises_on_nan(n: int) -> None:
    with pytest.raises(ArithmeticError, match=r"product with the Hessian is not finite; look for NaN in f"):
        top_eigenvalues(lambda x: (x * math.nan).pow(2).sum(), torch.randn(n))


@pytest.mark.parametrize("n", [5, 100])
def test_top_eigenvalues_of_a_linear_function_are_zero(n: int) -> None:
    assert top_eigenvalues(lambda x: 3 * x.sum(), torch.randn(n), 2).tolist() == [0.0, 0.0]
