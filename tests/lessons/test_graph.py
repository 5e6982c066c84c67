"""The numbers of the lesson ``graph``; counts that depend on how torch writes a formula are held as relations."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from metalearn.lessons import Lesson, graph
from tests.lessons.assertions import assert_checks

EXPECTED: dict[str, Any] = {
    "nodes of x^2: the power and the leaf": 2,
    "nodes of its gradient, create_graph=False": 0,
    "nodes of its gradient, create_graph=True: more than x^2": "True",
    "both graphs end in the same leaf, x": "True",
    "inputs of theta - alpha g with a graph, first order": 1,  # theta
    "inputs of theta - alpha g with a graph, second order": 2,  # theta, and g
    # Mean over tasks (sum), over examples, square, residual, tanh, product, the view of vmap's batch, update, expansion
    # of theta to T = 1 tasks, leaf.
    "second order's nodes without those that only g leads to": 10,
    "derivative of tanh's derivative, first order": "absent",
    "derivative of tanh's derivative, second order": "present",
    "paths from the query loss to theta, first order": 1,
    # g = 2 (p - y) (1 - p^2) x depends on theta through the residual p - y and through the slope 1 - p^2: 1 + 2 ways.
    "paths, second order: 1 and the Hessian's 2": 3,
}


def test_checks(lesson: Lesson) -> None:
    assert_checks(lesson, EXPECTED)


def test_both_orders_take_the_same_step_forward() -> None:
    first, second = (graph.one_step(second_order=order) for order in (False, True))
    assert torch.equal(first.query, second.query)
    # One weight 0.5, support x = (1, 2), y = (0.8, -0.4): g = mean of 2 (p - y) (1 - p^2) x with p = tanh(0.5 x).
    p = torch.tanh(0.5 * graph.SUPPORT[0][0])
    g = (2 * (p - graph.SUPPORT[1][0]) * (1 - p**2) * graph.SUPPORT[0][0]).mean()
    assert second.fast.item() == pytest.approx(0.5 - 0.1 * g.item(), rel=1e-14)


def test_notes_equal_the_plot(lesson: Lesson) -> None:
    first, second = (int(count) for count in re.findall(r"order (\d+)", lesson.notes[1]))
    assert second > first
    drawn = [
        sum(bool(re.search(r"Backward\d$|AccumulateGrad", text.get_text())) for text in axes.texts)
        for axes in lesson.plots["maml_step"].axes
    ]
    assert drawn == [first, second]
    assert lesson.notes[2].startswith(f"{second - first} of these")
