"""The results of the lessons: checks as in the committed reference, notes and plots that agree with each other."""

from __future__ import annotations

import gc
import json
import math
import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from metalearn.config import commands_schema as schema_commands
from metalearn.lessons import LESSONS, Check, Lesson, backward, big_product, finite_differences, maml, newton
from tests.lessons.conftest import RunLesson
from tests.paths import REPO

Vector = NDArray[np.float64]
REFERENCE = json.loads((REPO / "outputs/reference/lessons/lessons.json").read_text())["lessons"]


@pytest.mark.parametrize(
    ("computed", "expected", "tolerance", "passed"),
    [
        (2.0, 2.0, 0.0, True),
        (2.0 + 1e-9, 2.0, 1e-8, True),
        (2.0 + 1e-7, 2.0, 1e-8, False),
        (2, 3, 0.0, False),
        (math.nan, 2.0, 1.0, False),
        (math.inf, 2.0, 1.0, False),
        ("RuntimeError", "RuntimeError", 0.0, True),
        ("ValueError", "RuntimeError", 0.0, False),
        (0.0, "RuntimeError", 1.0, False),
    ],
)
def test_check_and_lesson_passed(computed: float | str, expected: float | str, tolerance: float, passed: bool) -> None:
    check = Check("", computed, expected, tolerance)
    assert check.passed is passed
    assert Lesson("", "", "", [Check("", 1.0, 1.0), check]).passed is passed
    assert not Lesson("", "", "", []).passed


def test_schema_and_reference_list_all_lessons() -> None:
    assert tuple(LESSONS) == schema_commands.LESSONS == tuple(entry["name"] for entry in REFERENCE)


@pytest.mark.parametrize("reference", REFERENCE, ids=lambda reference: reference["name"])
def test_checks_pass_and_expect_the_values_of_the_reference(reference: dict[str, Any], run_lesson: RunLesson) -> None:
    lesson = run_lesson(reference["name"])
    assert [check.name for check in lesson.checks if not check.passed] == []
    for check, known in zip(lesson.checks, reference["checks"], strict=True):
        assert (check.name, check.source) == (known["what"], known["source"])
        assert check.tolerance == pytest.approx(known["tolerance"])
        exact = isinstance(check.expected, (str, int))
        assert check.expected == (known["expected"] if exact else pytest.approx(known["expected"], rel=1e-9)), check
    assert max(len(line) for line in lesson.code.splitlines()) <= 120, (
        "as the code of the repository; narrower terminals break lines by fit_code"
    )
    assert '"""' not in lesson.code
    assert all(figure.axes for figure in lesson.plots.values())


def lines(lesson: Lesson, plot: str) -> list[list[Vector]]:
    """Return the points ``[n, 2]`` of every line in every panel of a plot."""
    return [[np.asarray(line.get_xydata()) for line in axes.get_lines()] for axes in lesson.plots[plot].axes]


def test_backward_emits_no_warnings_leaks_nothing_and_restores_settings(run_lesson: RunLesson) -> None:
    def tensors() -> int:
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    assert "reference cycle" in run_lesson("backward").notes[0]
    before = tensors()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backward.lesson()
    assert gc.isenabled()
    assert not torch.is_warn_always_enabled()
    gc.collect()
    assert tensors() == before


def test_create_graph_notes_two_different_errors(run_lesson: RunLesson) -> None:
    no_graph, misses_x = run_lesson("create_graph").notes
    assert "does not require grad" in no_graph
    assert "appears to not have been used in the graph" in misses_x


def test_orders_notes_equal_the_plotted_counts(run_lesson: RunLesson) -> None:
    lesson = run_lesson("orders")
    (drawn,) = lines(lesson, "nodes_by_order")
    noted = [[int(count) for count in note.rpartition(": ")[2].split(", ")] for note in lesson.notes[:3]]
    assert [line[:, 1].tolist() for line in drawn[:3]] == noted
    assert all(count[0] < count[9] for count in noted)


def test_graph_notes_equal_the_plot(run_lesson: RunLesson) -> None:
    lesson = run_lesson("graph")
    first, second = (int(count) for count in re.findall(r"order (\d+)", lesson.notes[1]))
    assert second > first
    assert [
        sum(bool(re.search(r"Backward\d$|AccumulateGrad", text.get_text())) for text in axes.texts)
        for axes in lesson.plots["maml_step"].axes
    ] == [first, second]
    assert lesson.notes[2].startswith(f"{second - first} of these")


def test_hvp_shows_two_lines_every_mode_and_tangents(run_lesson: RunLesson) -> None:
    lesson = run_lesson("hvp")
    assert "(grads,) = torch.autograd.grad(f(x), x, create_graph=True)" in lesson.code
    assert "(product,) = torch.autograd.grad(grads, x, grad_outputs=v)" in lesson.code
    assert "262,144 parameters" in lesson.notes[0]  # four layers of 256 x 256
    modes = ["forward_over_reverse", "reverse_over_reverse", "reverse_over_forward"]
    assert [note.partition(":")[0] for note in lesson.notes[1:]] == modes
    # at t = 1/2, x = (1.25, pi/2 + 1/2): gradient (2.5 cos 1/2, -1.5625 sin 1/2); the tangents are 2 + t and 0 - t
    heights = [2.5 * math.cos(0.5), 2.5, -1.5625 * math.sin(0.5), -0.5]
    for line, height in zip(lines(lesson, "hvp")[1], heights, strict=True):
        assert line[-1] == pytest.approx([0.5, height], rel=1e-6)


def test_dense_hessian_shows_bytes_and_seconds(run_lesson: RunLesson) -> None:
    lesson = run_lesson("dense_hessian")
    for axes in lesson.plots["dense_hessian"].axes:
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    (batched, row_by_row, product, matrix, *_), clock = lines(lesson, "dense_hessian")
    assert matrix.tolist() == [[10, 400], [1e6, 4e12]]
    for line in (batched, row_by_row):
        assert line[-1] == pytest.approx([1000, 8e6], rel=0.25)  # twice the matrix
    assert product[-1][1] < 1e5
    assert all(len(line) >= 5 for line in clock)
    assert "GiB are free here: by hessian_bytes, 8 n^2 in float32, that holds n = " in lesson.notes[-1]
    assert any(note.startswith("hessian, n = 1,000: 4 MB in ") for note in lesson.notes)


def test_finite_differences_marks_the_best_steps(run_lesson: RunLesson) -> None:
    for panel in lines(run_lesson("finite_differences"), "finite_differences"):
        assert len(panel) == 8
        for curve, mark in zip(panel[::2], panel[1::2], strict=True):
            assert mark[0].tolist() == curve[curve[:, 1].argmin()].tolist()
    # the smallest errors foreseen in float64 are eps^(2/3) = 4e-11 and eps^(1/2) = 1.5e-8
    smallest = {m.name: min(finite_differences.errors(m, torch.float64)) for m in finite_differences.METHODS}
    assert smallest["difference of gradients"] < smallest["second difference"] / 50


def test_big_product_notes_equal_the_bars(run_lesson: RunLesson) -> None:
    lesson = run_lesson("big_product")
    noted = [float(found[1]) for note in lesson.notes if (found := re.search(r": ([\d.]+) vectors", note))]
    (axes,) = lesson.plots["big_product"].axes
    bars = [patch.get_width() / 4e7 for patch in axes.patches]  # type: ignore[attr-defined]  # they are rectangles
    assert len(noted) == 3
    assert bars == [1.0, *(pytest.approx(vectors, abs=0.051) for vectors in noted), 1e7]
    # mean(v) is 1 up to 10^-3.5, so that a product without 1 1^T / n would be wrong by 1, not by 10^-5
    draw = torch.Generator().manual_seed(0)
    torch.rand(big_product.N, generator=draw)
    assert (torch.randn(big_product.N, generator=draw) + 1).mean().item() == pytest.approx(1, abs=2e-3)


def test_newton_is_superlinear_within_the_budget_of_gradient_descent(run_lesson: RunLesson) -> None:
    lesson = run_lesson("newton")
    path = newton.newton_cg(newton.rosenbrock, torch.zeros(10, dtype=torch.float64))
    assert 20 < len(path) < 120
    # theorem 7.2: |g_k+1| is of the order of |g_k|^(3/2), so the third last to the second last at most some times that
    assert path[-2].norm < 20 * path[-3].norm ** 1.5
    assert path[-1].norm < 1e-9
    assert f"{len(path) - 1} steps, {path[-1].cost} gradients" in lesson.notes[0]
    by_newton, by_descent = lines(lesson, "newton")[1]
    assert by_descent[-1][0] == 10 * by_newton[-1][0]
    same = by_descent[int(by_newton[-1][0]) - 1]
    assert same[0] == by_newton[-1][0]
    assert same[1] > 0.1  # not there, by the gradient's length either
    assert by_newton[-1][1] < 1e-9


def test_sharpness_plot_has_the_lines_two_over_lr(run_lesson: RunLesson) -> None:
    lesson = run_lesson("sharpness")
    loss, sharp = lines(lesson, "sharpness")
    assert [line[0, 1] for line in sharp if len(line) == 2] == [8.0, 5.0]
    below, middle, steep = (line[:, 1] for line in sharp if len(line) > 2)
    assert below[0] == middle[0] == steep[0] < 5  # the same network, below both lines
    assert below[-1] > 5
    assert len(loss) == 3
    assert lesson.plots["sharpness"].axes[0].get_yscale() == "log"


def test_pinn_solution_satisfies_the_boundary(run_lesson: RunLesson) -> None:
    lesson = run_lesson("pinn")
    sine, smooth, kinked = lines(lesson, "pinn")[0]
    assert sine[[0, 500, -1], 0] == pytest.approx([0, np.pi, 2 * np.pi])
    assert smooth[:, 1] == pytest.approx(np.sin(smooth[:, 0]), abs=1e-3)
    assert np.abs(np.diff(kinked[:, 1], 2)).max() > 0  # it has kinks, between which it is straight
    assert (np.abs(np.diff(kinked[:, 1], 2)) < 1e-9).mean() > 0.9
    assert lesson.plots["pinn"].axes[1].get_yscale() == "log"
    assert [note[:11] for note in lesson.notes] == ["tanh: loss ", "ReLU: loss "]


def gradient_by_hand(theta: Vector, x: Vector, y: Vector) -> Vector:
    """Return the gradient of the mean squared error of the tanh network with 4 hidden units."""
    w1, b1, w2, b2 = theta[:4], theta[4:8], theta[8:12], theta[12]
    h = np.tanh(x[:, None] * w1 + b1)
    residual = 2 * (h @ w2 + b2 - y) / len(x)
    slope = residual[:, None] * w2 * (1 - h**2)
    return np.concatenate([x @ slope, slope.sum(0), residual @ h, [residual.sum()]])


def test_maml_hessian_term_equals_differences_by_hand(run_lesson: RunLesson) -> None:
    lesson = run_lesson("maml")
    theta = maml.THETA.numpy()
    x, y, query_x, query_y = (t[0].numpy() for t in vars(maml.SINE).values())

    def hessian_times(v: Vector, h: float = 1e-5) -> Vector:
        return (gradient_by_hand(theta + h * v, x, y) - gradient_by_hand(theta - h * v, x, y)) / (2 * h)

    computed = {check.name: check.computed for check in lesson.checks}
    adapted = gradient_by_hand(theta - 0.1 * gradient_by_hand(theta, x, y), query_x, query_y)
    term = np.linalg.norm(0.1 * hessian_times(adapted))
    assert computed["length of the Hessian term, second - first"] == pytest.approx(term, rel=1e-7)
    g = gradient_by_hand(theta, query_x, query_y)  # every H_k and g tend to those at theta when alpha tends to 0
    limit = 3 * np.linalg.norm(hessian_times(g)) / np.linalg.norm(g)
    gap = computed["K = 3: gap / alpha at alpha = 1e-5, against 3 |H g| / |g|"]
    assert gap == pytest.approx(limit, rel=1e-3)

    bars = [bar.get_height() for bar in lesson.plots["hessian_term"].axes[0].patches if hasattr(bar, "get_height")]
    panels = lines(lesson, "hessian_term")
    (points,) = (line for line in panels[0] if len(line) == len(theta) == 13)
    np.testing.assert_allclose(points[:, 1], bars, rtol=1e-9, atol=1e-12)
    assert [len(panel) for panel in panels[1:]] == [3, 3]
