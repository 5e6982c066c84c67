"""The numbers of the lesson ``orders``."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from metalearn.lessons import Lesson, nth_order
from tests.lessons.assertions import assert_checks, zero

EXPECTED: dict[str, Any] = {
    "x^3 at 2, derivative 1": 12.0,  # 3 x^2
    "x^3 at 2, derivative 2": 12.0,  # 6 x
    "x^3 at 2, derivative 3": 6.0,
    "x^3 at 2, derivative 4": 0.0,
    "first derivative has a graph, create_graph=True": "True",
    "first derivative has a graph, create_graph=False": "False",
    "second derivative has a graph, create_graph=True": "True",
    "second derivative has a graph, create_graph=False": "False",
    "x**3, derivative 5": "RuntimeError",  # the fourth is a 0 without a graph
    "x * x * x, derivative 4": "RuntimeError",  # the third is a 6 without a graph
    "x * x * x, derivative 4 by nth_derivative": 0.0,
    "x^12 at 2, derivative 12: 12!": 479_001_600.0,
    "largest relative error, x^12, orders 0 to 12": zero(1e-12),
    "largest relative error, sin x at 0.7, orders 0 to 12": zero(1e-12),
    "e^x at 0.7, derivative 12": pytest.approx(2.013752707470477, rel=1e-14),  # e^0.7
    "largest relative error, e^x sin x, orders 0 to 9": zero(1e-12),
    "largest relative difference to nth_derivative, x^12, orders 0 to 6": zero(1e-11),
    "largest relative difference to nth_derivative, e^x sin x, orders 0 to 6": zero(1e-11),
    "largest relative difference to nth_derivative, tanh x, orders 0 to 6": zero(1e-11),
    "e^x sin x: nodes at least double with every order": "True",
    "sin x: nodes at order 9, as at order 1": 3,  # cos x times the incoming 1: the product, the cosine and the leaf
}


def test_checks(lesson: Lesson) -> None:
    assert_checks(lesson, EXPECTED)


def test_derivatives_of_known_functions() -> None:
    # f = e^x sin x, f' = e^x (sin x + cos x), f'' = 2 e^x cos x, f'''' = -4 f. x^12 at 2: 12 * 2^11, 12 * 11 * 2^10.
    value, first, second, _, fourth = (d.item() for d in nth_order.nested(nth_order.spiral, 0.7, 4))
    exponential, sine, cosine = math.exp(0.7), math.sin(0.7), math.cos(0.7)
    assert value == pytest.approx(exponential * sine, rel=1e-14)
    assert first == pytest.approx(exponential * (sine + cosine), rel=1e-14)
    assert second == pytest.approx(2 * exponential * cosine, rel=1e-14)
    assert fourth == pytest.approx(-4 * value, rel=1e-14)
    assert [d.item() for d in nth_order.nested(nth_order.twelfth_power, 2.0, 2)] == [4096.0, 24_576.0, 135_168.0]


def test_notes_equal_the_plotted_counts(lesson: Lesson) -> None:
    (axes,) = lesson.plots["nodes_by_order"].axes
    drawn = [np.asarray(line.get_ydata()).tolist() for line in axes.get_lines()]
    noted = [[int(count) for count in note.rpartition(": ")[2].split(", ")] for note in lesson.notes[:3]]
    assert drawn[:3] == noted
    assert all(count[0] < count[9] for count in noted)
