"""The functions that the lessons show, against values by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

from metalearn.derivatives import HVP_MODES
from metalearn.lessons import (
    big_product,
    create_graph,
    dense_hessian,
    finite_differences,
    graph,
    hvp,
    newton,
    nth_order,
    pinn,
    sharpness,
)
from metalearn.lessons.dense_hessian import Measured, exponent
from metalearn.lessons.finite_differences import METHODS, STEPS
from metalearn.lessons.graph_drawing import depth, draw, inputs, is_leaf, name_of, nodes, paths
from metalearn.lessons.lesson import leaf


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_relu_network_has_kinks_inside_the_plot() -> None:
    # Its first derivative is a staircase with a step a kink: zero curvature does not come from a straight line.
    slope = create_graph.in_the_input(torch.nn.ReLU(), create_graph.GRID)[1]
    assert len({round(value, 9) for value in slope.tolist()}) == len(create_graph.KINKS) + 1


def test_nested_derivatives_of_known_functions() -> None:
    # f = e^x sin x, f' = e^x (sin x + cos x), f'' = 2 e^x cos x, f'''' = -4 f. x^12 at 2: 12 * 2^11, 12 * 11 * 2^10.
    value, first, second, _, fourth = (d.item() for d in nth_order.nested(nth_order.spiral, 0.7, 4))
    exponential, sine, cosine = math.exp(0.7), math.sin(0.7), math.cos(0.7)
    known = [exponential * sine, exponential * (sine + cosine), 2 * exponential * cosine, -4 * value]
    assert [value, first, second, fourth] == pytest.approx(known, rel=1e-14)
    assert [d.item() for d in nth_order.nested(nth_order.twelfth_power, 2.0, 2)] == [4096.0, 24_576.0, 135_168.0]


def test_both_orders_take_the_same_step_forward() -> None:
    first, second = (graph.one_step(second_order=order) for order in (False, True))
    assert torch.equal(first.query, second.query)
    # One weight 0.5, support x = (1, 2), y = (0.8, -0.4): g = mean of 2 (p - y) (1 - p^2) x with p = tanh(0.5 x).
    x, y = (t[0] for t in graph.SUPPORT)
    p = torch.tanh(0.5 * x)
    g = (2 * (p - y) * (1 - p**2) * x).mean()
    assert second.fast.item() == pytest.approx(0.5 - 0.1 * g.item(), rel=1e-14)


def test_two_lines_at_another_point() -> None:
    # at (2, 0): H = [[2 sin 0, 4 cos 0], [4 cos 0, -4 sin 0]] = [[0, 4], [4, 0]], so H (3, 5) = (20, 12)
    found = hvp.two_lines(double(2.0, 0.0).requires_grad_(), double(3.0, 5.0))
    assert found.tolist() == pytest.approx([20.0, 12.0], abs=1e-12)


@pytest.mark.parametrize("route", [dense_hessian.batched, dense_hessian.row_by_row])
def test_hessian_of_three_numbers(route: Any) -> None:
    # sum x^4 / 12 + (sum x)^2 / 6 at (1, 2, 3): diag(1, 4, 9) + 1/3
    known = [[4 / 3, 1 / 3, 1 / 3], [1 / 3, 13 / 3, 1 / 3], [1 / 3, 1 / 3, 28 / 3]]
    torch.testing.assert_close(route(double(1.0, 2.0, 3.0)), torch.tensor(known, dtype=torch.float64))
    row_sums = dense_hessian.one_product(double(1.0, 2.0, 3.0))
    assert row_sums.tolist() == pytest.approx([2.0, 5.0, 10.0], abs=1e-12)


def test_exponent_of_cubic_growth() -> None:
    cubic = [Measured(n, 7 * n**3, 0.0, None) for n in (10, 100, 1000)]
    assert exponent(cubic) == pytest.approx(3, abs=1e-9)


# p, q, the best step in float64 and float32, and the relative error at h = 0.1 of f = exp, whose derivatives are alike:
#   forward                  h/2    + 2 eps/h      least at h = 2 eps^(1/2)     (e^h - 1) / h - 1
#   central, of gradients    h^2/6  + eps/h        least at h = (3 eps)^(1/3)   sinh(h) / h - 1
#   second difference        h^2/12 + 4 eps/h^2    least at h = (48 eps)^(1/4)  2 (cosh h - 1) / h^2 - 1
CENTRAL = (2, 1, (8.7e-6, 7.1e-3), math.sinh(0.1) / 0.1 - 1)
KNOWN = {
    "forward": (1, 1, (3.0e-8, 6.9e-4), (math.exp(0.1) - 1) / 0.1 - 1),
    "central": CENTRAL,
    "second difference": (2, 2, (3.2e-4, 4.9e-2), 2 * (math.cosh(0.1) - 1) / 0.1**2 - 1),
    "difference of gradients": CENTRAL,
}


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_difference_formula_has_the_predicted_steps_and_errors(method: finite_differences.Method) -> None:
    order, rounding, best, error = KNOWN[method.name]
    assert (method.order, method.rounding) == (order, rounding)
    eps = (2.220446049250313e-16, 1.1920928955078125e-07)
    assert [method.best(e) for e in eps] == pytest.approx(best, rel=0.02)
    at = min(range(len(STEPS)), key=lambda i: abs(STEPS[i] - 0.1))
    assert STEPS[at] == pytest.approx(0.1)
    assert finite_differences.errors(method, torch.float64)[at] == pytest.approx(error, rel=1e-6)


def test_known_product_equals_dense_hessian() -> None:
    # f = -sum cos x + (sum x)^2 / 2n at n = 4: H = diag(cos x) + 1/4 everywhere
    x, v = double(0.0, 1.0, -2.0, 3.0), double(1.0, -3.0, 0.5, 2.0)
    dense = double(1.0, 0.5403023058681398, -0.4161468365471424, -0.9899924966004454).diag() + 0.25
    torch.testing.assert_close(big_product.known_product(x, v), dense @ v, rtol=0, atol=1e-7)
    torch.testing.assert_close(torch.func.hessian(big_product.f)(x), dense, rtol=0, atol=1e-7)


@pytest.mark.parametrize("mode", HVP_MODES)
def test_peak_is_a_few_vectors_at_small_size(mode: str) -> None:
    x = torch.linspace(-1, 1, 10_000)
    product, vectors = big_product.peak_of_product(x, torch.ones_like(x), mode)
    assert 3 <= vectors <= 12  # cos x, its slope and the product at least
    assert product.shape == x.shape


def test_newton_direction_solves_definite_system() -> None:
    # a short gradient asks for |r| <= |g|^1.5: 1e-12 of it here, so that p is -H^-1 g
    draw = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, dtype=torch.float64, generator=draw)
    h, grad = root @ root.T + torch.eye(6), 1e-24 * torch.randn(6, dtype=torch.float64, generator=draw)
    p, products = newton.newton_direction(lambda v: h @ v, grad)
    torch.testing.assert_close(p, -torch.linalg.solve(h, grad), rtol=1e-9, atol=0)
    assert products <= 12


@pytest.mark.parametrize(
    ("diagonal", "grad", "products", "direction"),
    [
        # |g| >= 1/4 asks for |r| <= |g| / 2 alone, which one product reaches where H is a multiple of the identity
        (double(2.0, 2.0), double(3.0, 4.0), 1, [-1.5, -2.0]),
        # the first direction is -g, and g'Hg = 1 - 9 < 0
        (double(1.0, -1.0), double(1.0, 3.0), 1, [-1.0, -3.0]),
        # g'Hg = 1 - 0.09 > 0, and the second direction bends: -g g'g / g'Hg
        (double(1.0, -0.01), double(1.0, 3.0), 2, [-10 / 0.91, -30 / 0.91]),
    ],
)
def test_newton_direction_stops_early(diagonal: Tensor, grad: Tensor, products: int, direction: list[float]) -> None:
    p, counted = newton.newton_direction(lambda v: diagonal * v, grad)
    assert counted == products
    assert p.tolist() == pytest.approx(direction)
    assert p.dot(grad) < 0


def test_backtrack_halves_the_step() -> None:
    # x^2 from 1 along -8: at step 1, 1/2 and 1/4 the points are -7, -3 and -1, not below; 1/8 leads to 0
    x, p = torch.tensor([1.0]), torch.tensor([-8.0])
    step, values = newton.backtrack(lambda x: x.square().sum(), x, p, grad=torch.tensor([2.0]))
    assert (step, values) == (0.125, 5)  # f(x), and four more


def test_newton_cg_counts_costs() -> None:
    # |x|^2: the first direction is exact, with one product (3); f at x and at x + p (2); the gradient there (1)
    path = newton.newton_cg(lambda x: x.square().sum() / 2, double(3.0, 4.0))
    assert [i.cost for i in path] == [1, 7]
    assert path[-1].norm == 0


def test_curvatures_of_rosenbrock_at_its_minimum() -> None:
    # at (1, ..., 1): 1200 x_i^2 - 400 x_i+1 + 2 = 802 first, 200 last, 1002 between; -400 x_i beside it
    h = np.diag([802.0, *[1002.0] * 8, 200.0]) + np.diag([-400.0] * 9, 1) + np.diag([-400.0] * 9, -1)
    values = np.linalg.eigvalsh(h)
    assert values[[0, -1]] == pytest.approx([0.499, 1762.8], rel=1e-3)
    assert values[-1] / values[0] == pytest.approx(3500, rel=0.02)  # the claim's factor
    assert 2 / values[-1] == pytest.approx(1.1e-3, rel=0.05)
    found = torch.func.hessian(newton.rosenbrock)(torch.ones(10, dtype=torch.float64))
    np.testing.assert_allclose(found.numpy(), h, atol=1e-9)


def test_dense_sharpness_of_two_blocks() -> None:
    # f = a^2/2 + 3 a b + b^2/2 in two tensors: [[1, 3], [3, 1]], eigenvalues 4 and -2
    theta = {"a": double(1.0)[None], "b": double(2.0)}
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


ONE_UNIT = {name: torch.ones(1, 1).double() for name in ("w1", "w2", "w3")} | {
    name: torch.zeros(1).double() for name in ("b1", "b2")
}
"""One unit in each layer, all weights 1, no biases: u = act(act(x))."""


def test_derivatives_of_one_unit() -> None:
    # u = tanh(tanh x) at x = 0.5 with s = tanh x, t = tanh s:  u' = (1 - t^2)(1 - s^2),
    # u'' = -2 t u' (1 - s^2) - 2 s u'
    s, t = np.tanh(0.5), np.tanh(np.tanh(0.5))
    first = (1 - t**2) * (1 - s**2)
    found = [d.item() for d in pinn.with_derivatives(ONE_UNIT, double(0.5), torch.tanh)]
    assert found == pytest.approx([t, first, -2 * t * first * (1 - s**2) - 2 * s * first], rel=1e-13)


def test_equation_sums_residual_and_initial_conditions() -> None:
    # u = relu(relu(x)) = x for x > 0, so u'' + u = x; at the points 1 and 2: (1 + 4) / 2 + u(1)^2 + (u'(1) - 1)^2
    x = double(1.0, 2.0)
    assert pinn.equation(ONE_UNIT, x, torch.relu).item() == pytest.approx(2.5 + 1 + 0)
    halved = ONE_UNIT | {"w3": double(0.5)[None]}  # u = x/2
    assert pinn.equation(halved, x, torch.relu).item() == pytest.approx(2.5 / 4 + 0.25 + 0.25)


def names(output: Tensor) -> list[str]:
    return [name_of(node) for node in nodes(output)]


def test_constants_have_no_nodes() -> None:
    x = leaf(2.0)
    for constant in (torch.ones(()), (x * x).detach()):
        assert (nodes(constant), paths(constant), depth(constant)) == ([], 0, 0)
    assert names(torch.ones(()) * x) == ["MulBackward0", "AccumulateGrad"]


def test_nodes_depth_and_paths() -> None:
    # x y + sin(x y): the product is shared, so four operations' nodes less none twice, and two leaves.
    x, y = leaf(2.0), leaf(3.0)
    product = x * y
    output = product + torch.sin(product)
    assert sorted(names(output)) == ["AccumulateGrad", "AccumulateGrad", "AddBackward0", "MulBackward0", "SinBackward0"]
    assert depth(output) == 4  # add, sin, mul, leaf
    assert paths(output) == 4  # two ways to the product, and two leaves from there
    assert sum(is_leaf(node) for node in nodes(output)) == 2


def test_nodes_are_in_topological_order() -> None:
    x = leaf(2.0)
    y = x * x
    found = nodes(y * torch.exp(y) + x)
    for i, node in enumerate(found):
        assert all(found.index(child) > i for child in inputs(node))


def test_nodes_without_a_subgraph() -> None:
    x, y = leaf(2.0), leaf(3.0)
    left, right = torch.sin(x), torch.exp(y)
    output = left + right
    assert right.grad_fn is not None
    rest = nodes(output, without=[right.grad_fn])
    assert [name_of(node) for node in rest] == ["AddBackward0", "SinBackward0", "AccumulateGrad"]


def test_graph_deeper_than_the_stack() -> None:
    x = leaf(1.0)
    y = x
    for _ in range(5000):
        y = y + 1
    assert (len(nodes(y)), paths(y), depth(y)) == (5001, 1, 5001)


def test_draw_places_nodes_apart() -> None:
    x = leaf(2.0)
    y = torch.exp(x) * torch.sin(x)
    axes = Figure().add_subplot()
    (root, *_), added = nodes(y), {node for node in nodes(y) if name_of(node) == "SinBackward0"}
    draw(axes, y, title="e^x sin x", notes={root: "the product"}, added=added)
    boxes = [text for text in axes.texts if text.get_text().endswith(("Backward0", "AccumulateGrad"))]
    assert sorted(box.get_text() for box in boxes) == sorted(names(y))
    assert len({box.get_position() for box in boxes}) == len(boxes)
    assert axes.get_title() == "e^x sin x"
    assert "the product" in [text.get_text() for text in axes.texts]
