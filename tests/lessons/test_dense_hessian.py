"""The numbers of the lesson ``dense_hessian``."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from metalearn.lessons import Lesson, dense_hessian
from metalearn.lessons.dense_hessian import Measured, exponent
from tests.lessons.assertions import assert_checks, zero

EXPECTED: dict[str, Any] = {
    "n = 1,000, hessian: largest error of an entry": zero(1e-5),
    "n = 1,000, row by row: largest error of an entry": zero(1e-5),
    "n = 1,000: bytes of the matrix": 4_000_000,  # 1,000^2 entries of 4 bytes
    "n = 1,000: peak over hessian_bytes": pytest.approx(1, abs=0.25),  # 8 MB, and the activations of 64 rows
    "n = 1,000: bytes of a product": 4_000,
    "bytes at n = 1,000 over bytes at n = 100": 100.0,  # (1,000 / 100)^2; exponential growth would make it 2^900
    "p in bytes = c n^p, hessian": pytest.approx(2, abs=1e-9),
    "p in bytes = c n^p, row by row": pytest.approx(2, abs=1e-9),
    "p in bytes = c n^p, one hvp": pytest.approx(1, abs=1e-9),
    "hessian at n = 10^6 with 1 TiB to use": "MemoryError that names hvp",  # 10^12 entries, 8 TB at the peak
}


def test_checks(lesson: Lesson) -> None:
    assert_checks(lesson, EXPECTED)


@pytest.mark.parametrize("route", [dense_hessian.batched, dense_hessian.row_by_row])
def test_hessian_of_three_numbers(route: Any) -> None:
    # sum x^4 / 12 + (sum x)^2 / 6 at (1, 2, 3): diag(1, 4, 9) + 1/3
    found = route(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    known = [[4 / 3, 1 / 3, 1 / 3], [1 / 3, 13 / 3, 1 / 3], [1 / 3, 1 / 3, 28 / 3]]
    torch.testing.assert_close(found, torch.tensor(known, dtype=torch.float64))


def test_one_product_equals_row_sums() -> None:
    found = dense_hessian.one_product(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    assert found.tolist() == pytest.approx([2.0, 5.0, 10.0], abs=1e-12)


def test_exponent_of_cubic_growth() -> None:
    cubic = [Measured(n, 7 * n**3, 0.0, None) for n in (10, 100, 1000)]
    assert exponent(cubic) == pytest.approx(3, abs=1e-9)


def test_plot_shows_bytes_and_seconds(lesson: Lesson) -> None:
    memory, clock = lesson.plots["dense_hessian"].axes
    for axes in (memory, clock):
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    batched, row_by_row, product, matrix = (np.asarray(line.get_xydata()) for line in memory.get_lines()[:4])
    assert matrix.tolist() == [[10, 400], [1e6, 4e12]]
    for line in (batched, row_by_row):
        assert line[-1] == pytest.approx([1000, 8e6], rel=0.25)  # twice the matrix
    assert product[-1][1] < 1e5
    assert all(len(np.asarray(line.get_xdata())) >= 5 for line in clock.get_lines())


def test_notes_extrapolate_to_the_free_memory(lesson: Lesson) -> None:
    assert "GiB are free here: by hessian_bytes, 8 n^2 in float32, that holds n = " in lesson.notes[-1]
    assert any(note.startswith("hessian, n = 1,000: 4 MB in ") for note in lesson.notes)
