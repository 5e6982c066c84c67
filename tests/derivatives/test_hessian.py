"""The dense Hessian against closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from metalearn.core.profiling.memory import PeakTensorMemory
from metalearn.derivatives import (
    hessian,
    hessian_bytes,
    hvp,
)

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


def test_hessian_times_vector_equals_hvp() -> None:
    w = torch.randn(4, 6, dtype=DOUBLE)

    def f(x: Tensor) -> Tensor:
        return torch.logsumexp(torch.tanh(w @ x), dim=0)

    x, v = torch.randn(6, dtype=DOUBLE), torch.randn(6, dtype=DOUBLE)
    torch.testing.assert_close(hessian(f, x) @ v, hvp(f, x, v))


def test_hessian_of_masked_select_raises() -> None:
    x, mask = torch.randn(5, dtype=DOUBLE), torch.tensor([True, False, True, True, False])
    with pytest.raises(NotImplementedError, match=r"^masked_select: .*x\[mask\]"):
        hessian(lambda x: x.masked_select(mask).pow(3).sum(), x)
    got = hessian(lambda x: x[mask].pow(3).sum(), x)
    torch.testing.assert_close(got, torch.diag(6 * x * mask))
