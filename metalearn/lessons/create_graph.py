"""The effect of ``create_graph``: with it a gradient can be differentiated again, without it not.

y = x^2,    dy/dx = 2 x = 6,    d2y/dx2 = 2    at x = 3
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from matplotlib.figure import Figure
from torch import Tensor

from metalearn.derivatives import hessian
from metalearn.lessons.lesson import (
    BLUE,
    VERMILION,
    Check,
    Lesson,
    error_message,
    leaf,
    panels,
    source_of,
    value_or_error,
)

_CLAIM = """\
With create_graph=True a gradient carries a graph of its own and can be differentiated again. Without it the second \
call raises a RuntimeError. It does not return zeros, as is often written, and retain_graph=True is no remedy.

It fails silently where the gradient is one term of a sum. The sum still has a graph through its other terms, and the \
gradient counts as a constant. First-order MAML does this on purpose.

Real zeros come from the function. A network of ReLUs is piecewise linear in its input, so its second derivative in \
the input is zero almost everywhere; in the weights of two layers, and for any curved loss, it is not. Where the \
gradient is a constant (5 x), the second call raises as well. Where its graph does not contain x (w x, with w a \
parameter), allow_unused=True turns the error into None and materialize_grads=True into a zero."""


def twice(*, create_graph: bool, retain_graph: bool | None = None) -> tuple[Tensor, Tensor]:
    """Return the first and second derivative of x^2 at 3."""
    x = leaf(3.0)
    y = x**2
    (dy,) = torch.autograd.grad(y, x, create_graph=create_graph, retain_graph=retain_graph)
    (d2y,) = torch.autograd.grad(dy, x)  # raises unless dy carries a graph
    return dy, d2y


def penalised(*, create_graph: bool, detach: bool = False) -> Tensor:
    """Return the gradient of x^3 + (dy/dx)^2, with y = x^2, at 3."""
    x = leaf(3.0)
    (dy,) = torch.autograd.grad(x**2, x, create_graph=create_graph)
    total = x**3 + (dy.detach() if detach else dy) ** 2
    return torch.autograd.grad(total, x)[0]  # 3 x^2 + 2 dy d2y, or 3 x^2 alone


def linear(slope: Tensor, *, allow_unused: bool | None = None, materialize_grads: bool = False) -> Tensor | None:
    """Return the second derivative of slope * x in x, which nothing depends on."""
    x = leaf(3.0)
    (dy,) = torch.autograd.grad(slope * x, x, create_graph=True)
    second: Tensor | None
    (second,) = torch.autograd.grad(dy, x, allow_unused=allow_unused, materialize_grads=materialize_grads)
    return second


def detached() -> Tensor:
    """Do the same as ``twice``, with the gradient cut out of its graph."""
    x = leaf(3.0)
    (dy,) = torch.autograd.grad(x**2, x, create_graph=True)
    return torch.autograd.grad(dy.detach(), x)[0]


def in_the_input(activation: torch.nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a network of one hidden layer at every entry of x, and its first two derivatives in x."""
    x = x.clone().requires_grad_()
    y = (activation(x[:, None] - KINKS) * HEIGHTS).sum(dim=1)
    (dy,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (d2y,) = torch.autograd.grad(dy.sum(), x)
    return y.detach(), dy.detach(), d2y


KINKS = torch.tensor([-2.2, -1.3, -0.4, 0.7, 1.6], dtype=torch.float64)
HEIGHTS = torch.tensor([1.0, -1.8, 1.5, -1.6, 1.4], dtype=torch.float64)
GRID = torch.linspace(-3, 3, 241, dtype=torch.float64) + 0.003  # no point of it is a kink


def lesson() -> Lesson:
    """Run the lesson."""
    return Lesson(
        title="create_graph: what makes a gradient differentiable",
        claim=_CLAIM,
        code=source_of(leaf, twice, penalised, in_the_input),
        checks=[*_second_derivatives(), *_piecewise_linear(), *_no_way_to_x()],
        notes=[
            f"without create_graph: {error_message(lambda: twice(create_graph=False))}",
            f"with a graph that does not reach x: {error_message(lambda: linear(leaf(5.0)))}",
        ],
        plots={"relu_and_tanh": _plot()},
    )


def _second_derivatives() -> list[Check]:
    dy, d2y = twice(create_graph=True)
    wrong = {
        "create_graph=False": value_or_error(lambda: twice(create_graph=False)[1]),
        "retain_graph=True instead": value_or_error(lambda: twice(create_graph=False, retain_graph=True)[1]),
        "dy/dx detached": value_or_error(detached),
    }
    sums = {
        "create_graph=True": (penalised(create_graph=True), 51.0),  # x^3 + (2 x)^2: 3 x^2 + 8 x = 27 + 24
        "create_graph=False": (penalised(create_graph=False), 27.0),  # x^3 + a constant: 3 x^2
        "dy/dx detached": (penalised(create_graph=True, detach=True), 27.0),
    }
    return [
        Check("dy/dx of x^2 at 3", dy.item(), 6.0),
        Check("d2y/dx2 of x^2, create_graph=True", d2y.item(), 2.0),
        *(Check(f"d2y/dx2 of x^2, {how}", value, "RuntimeError", source="observed") for how, value in wrong.items()),
        *(Check(f"d/dx of x^3 + (dy/dx)^2, {how}", sum_.item(), known) for how, (sum_, known) in sums.items()),
    ]


def _piecewise_linear() -> list[Check]:
    curvature = in_the_input(torch.nn.ReLU(), GRID)[2].abs().max().item()
    tanh = in_the_input(torch.nn.Tanh(), GRID)
    t = torch.tanh(GRID[:, None] - KINKS)
    formula = (-2 * t * (1 - t**2) * HEIGHTS).sum(dim=1)

    def two_layers(w: Tensor) -> Tensor:
        return w[1] * torch.relu(w[0] * 3.0)  # of one unit each, at x = 3

    w = torch.tensor([2.0, 5.0], dtype=torch.float64)
    network, loss = hessian(two_layers, w), hessian(lambda w: (two_layers(w) - 29.0) ** 2, w)
    return [
        Check("largest |d2y/dx2| of a ReLU network in its input", curvature, 0.0),
        Check("tanh network: largest error of d2y/dx2", (tanh[2] - formula).abs().max().item(), 0.0, tolerance=1e-12),
        Check("y = w2 relu(3 w1) at w = (2, 5): d2y/dw1 dw1", network[0, 0].item(), 0.0),
        Check("y = w2 relu(3 w1) at w = (2, 5): d2y/dw1 dw2", network[0, 1].item(), 3.0),
        Check("loss (y - 29)^2: d2/dw1 dw1", loss[0, 0].item(), 450.0, tolerance=1e-9),
        Check("loss (y - 29)^2: d2/dw1 dw2", loss[0, 1].item(), 186.0, tolerance=1e-9),
    ]


def _no_way_to_x() -> list[Check]:
    five = torch.tensor(5.0, dtype=torch.float64)
    observed: list[tuple[str, str, Callable[[], Tensor | None]]] = [
        ("5 x: second call", "RuntimeError", lambda: linear(five)),
        ("5 x, materialize_grads=True", "RuntimeError", lambda: linear(five, materialize_grads=True)),
        ("w x, w a leaf: second call", "RuntimeError", lambda: linear(leaf(5.0))),
        ("w x, allow_unused=True", "None", lambda: linear(leaf(5.0), allow_unused=True)),
    ]
    flat = hessian(lambda x: five * x, torch.tensor(3.0, dtype=torch.float64))
    return [
        *(Check(name, value_or_error(compute), expected, source="observed") for name, expected, compute in observed),
        Check("w x, materialize_grads=True", value_or_error(lambda: linear(leaf(5.0), materialize_grads=True)), 0.0),
        Check("5 x: metalearn.derivatives.hessian", flat.item(), 0.0),
    ]


def _plot() -> Figure:
    figure, axes = panels(3, width=11, height=3.4)
    titles = ("network, y(x)", "first derivative, dy/dx", "second derivative, d²y/dx²")
    relu, tanh = in_the_input(torch.nn.ReLU(), GRID), in_the_input(torch.nn.Tanh(), GRID)
    for panel, title, by_relu, by_tanh in zip(axes, titles, relu, tanh, strict=True):
        panel.plot(GRID, by_relu, color=BLUE, linewidth=1.8, label="ReLU network")
        panel.plot(GRID, by_tanh, "--", color=VERMILION, linewidth=1.8, label="tanh network")
        panel.set(title=title, xlabel="input x")
        panel.axhline(0, color="black", linewidth=0.5, zorder=0)
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=2)
    return figure
