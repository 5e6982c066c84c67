"""The largest eigenvalues of a Hessian, against known spectra."""

from __future__ import annotations

import math

import pytest
import torch

from metalearn.derivatives import (
    top_eigenvalues,
)

DOUBLE = torch.float64


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


def test_top_eigenvalues_raises_on_bad_arguments() -> None:
    x = torch.zeros(3)
    with pytest.raises(ValueError, match=r"k=4; it must be at least 1 and at most n = 3"):
        top_eigenvalues(lambda x: x.sum(), x, 4)
    with pytest.raises(ValueError, match=r"k=0"):
        top_eigenvalues(lambda x: x.sum(), x, 0)
    for n in (5, 100):
        with pytest.raises(ArithmeticError, match=r"product with the Hessian is not finite; look for NaN in f"):
            top_eigenvalues(lambda x: (x * math.nan).pow(2).sum(), torch.randn(n))


@pytest.mark.parametrize("n", [5, 100])
def test_top_eigenvalues_of_a_linear_function_are_zero(n: int) -> None:
    assert top_eigenvalues(lambda x: 3 * x.sum(), torch.randn(n), 2).tolist() == [0.0, 0.0]
