"""The numbers of the lesson ``big_product``."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from metalearn.derivatives import HVP_MODES
from metalearn.lessons import Lesson, big_product
from tests.lessons.assertions import assert_checks, zero

EXPECTED: dict[str, Any] = {"bytes of the matrix, n^2 x 4": 4e14}  # (10^7)^2 x 4
for mode in ("forward_over_reverse", "reverse_over_reverse", "reverse_over_forward"):
    EXPECTED[f"{mode}: largest error of an entry of H v"] = zero(1e-5)
    EXPECTED[f"{mode}: peak within 12 vectors of 40 MB"] = "yes"
EXPECTED |= {
    "grad_outputs=ones on a gradient without a graph": "RuntimeError, does not require grad",
    # x1^2 x2 + x2 x3^2 at (1, 2, 3) has H = [[4, 2, 0], [2, 0, 6], [0, 6, 4]]
    "grad_outputs=ones with a graph, entry 1": pytest.approx(6.0, abs=1e-6),
    "grad_outputs=ones with a graph, entry 2": pytest.approx(8.0, abs=1e-6),
    "grad_outputs=ones with a graph, entry 3": pytest.approx(10.0, abs=1e-6),
}


def test_checks(lesson: Lesson) -> None:
    assert_checks(lesson, EXPECTED)


def test_known_product_equals_dense_hessian() -> None:
    # f = -sum cos x + (sum x)^2 / 2n at n = 4: H = diag(cos x) + 1/4 everywhere
    x = torch.tensor([0.0, 1.0, -2.0, 3.0], dtype=torch.float64)
    v = torch.tensor([1.0, -3.0, 0.5, 2.0], dtype=torch.float64)
    dense = (
        torch.diag(torch.tensor([1.0, 0.5403023058681398, -0.4161468365471424, -0.9899924966004454]).double()) + 0.25
    )
    torch.testing.assert_close(big_product.known_product(x, v), dense @ v, rtol=0, atol=1e-7)
    torch.testing.assert_close(torch.func.hessian(big_product.f)(x), dense, rtol=0, atol=1e-7)


def test_coupling_is_above_the_tolerance(lesson: Lesson) -> None:
    # mean(v) is 1 up to 10^-3.5, so that a product without 1 1^T / n would be wrong by 1, not by 10^-5
    draw = torch.Generator().manual_seed(0)
    torch.rand(big_product.N, generator=draw)
    assert (torch.randn(big_product.N, generator=draw) + 1).mean().item() == pytest.approx(1, abs=2e-3)
    assert lesson.passed


@pytest.mark.parametrize("mode", HVP_MODES)
def test_peak_is_a_few_vectors_at_small_size(mode: str) -> None:
    x = torch.linspace(-1, 1, 10_000)
    product, vectors = big_product.peak_of_product(x, torch.ones_like(x), mode)
    assert 3 <= vectors <= 12  # cos x, its slope and the product at least
    assert product.shape == x.shape


def test_notes_equal_the_bars_of_the_plot(lesson: Lesson) -> None:
    noted = [float(found[1]) for note in lesson.notes if (found := re.search(r": ([\d.]+) vectors", note))]
    (axes,) = lesson.plots["big_product"].axes
    bars = [patch.get_width() / 4e7 for patch in axes.patches]  # type: ignore[attr-defined]  # they are rectangles
    assert len(noted) == 3
    assert bars == [1.0, *(pytest.approx(vectors, abs=0.051) for vectors in noted), 1e7]
