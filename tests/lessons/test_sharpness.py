"""The numbers of the lesson ``sharpness``."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from metalearn.lessons import Lesson, sharpness
from tests.lessons.assertions import assert_checks, zero

EXPECTED: dict[str, Any] = {
    "quadratic: lambda_max": pytest.approx(10, abs=1e-2),
    # along the first eigenvector a step multiplies by 1 - 10 lr: -0.9 for lr = 0.19, -1.1 for 0.21
    "quadratic, lr = 0.95 x 2 / lambda_max: growth in 50 steps": pytest.approx(0.005153775207320113, abs=1e-9),
    "quadratic, lr = 1.05 x 2 / lambda_max: growth in 50 steps": pytest.approx(117.39085287969579, abs=1e-6),
    "the first, from anywhere": "falls",
    "the second, from anywhere": "grows",
    "sharpness at the start: Lanczos against dense, relative": zero(1e-3),
    "sharpness at the end: Lanczos against dense, relative": zero(1e-3),
    "lr = 0.05: sharpness above 2 / lr at some step": "no",
    "lr = 0.05: loss rises in some step": "no",
    "lr = 0.25: sharpness over 2 / lr, mean of the last quarter": pytest.approx(1, abs=0.15),
    "lr = 0.25: sharpness above 2 / lr at some step": "yes",
    "lr = 0.25: loss halved at least since that step": "yes",
    "lr = 0.4: sharpness over 2 / lr, mean of the last quarter": pytest.approx(1, abs=0.15),
    "lr = 0.4: sharpness above 2 / lr at some step": "yes",
    "lr = 0.4: loss halved at least since that step": "yes",
}


def test_checks(lesson: Lesson) -> None:
    assert_checks(lesson, EXPECTED)


def test_dense_sharpness_of_two_blocks() -> None:
    # f = a^2/2 + 3 a b + b^2/2 in two tensors: [[1, 3], [3, 1]], eigenvalues 4 and -2
    theta = {"a": torch.tensor([[1.0]], dtype=torch.float64), "b": torch.tensor([2.0], dtype=torch.float64)}
    found = sharpness.dense_sharpness(
        lambda t: (t["a"].square() / 2 + 3 * t["a"] * t["b"] + t["b"].square() / 2).sum(), theta
    )
    assert found == pytest.approx(4, abs=1e-12)


def test_train_is_gradient_descent(monkeypatch: pytest.MonkeyPatch) -> None:
    # on x^2/2 summed over 40 numbers, lr = 0.1 shrinks each by 0.9 a step, and the sharpness is 1 throughout
    monkeypatch.setattr(sharpness, "_STEPS", 20)
    theta = {"x": torch.ones(40, dtype=torch.float64)}
    run = sharpness.train(lambda t: t["x"].square().sum() / 2, theta, lr=0.1)
    assert run.losses == pytest.approx([20 * 0.81**k for k in range(21)], rel=1e-12)
    assert run.sharpness == {0: pytest.approx(1), 20: pytest.approx(1)}


def test_plot_has_the_lines_two_over_lr(lesson: Lesson) -> None:
    loss, sharp = lesson.plots["sharpness"].axes
    levels = [np.asarray(line.get_ydata()) for line in sharp.get_lines()]
    assert [level[0] for level in levels if len(level) == 2] == [8.0, 5.0]
    below, middle, steep = (level for level in levels if len(level) > 2)
    assert below[0] == middle[0] == steep[0] < 5  # the same network, below both lines
    assert below[-1] > 5
    assert len(loss.get_lines()) == 3
    assert loss.get_yscale() == "log"
