"""Derivatives of any order by repeated differentiation, and the cost of each order.

y, dy/dx, d2y/dx2, ... :  every autograd.grad(..., create_graph=True) differentiates the graph of the last one
"""

from __future__ import annotations

import math
import timeit
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from matplotlib.figure import Figure
from torch import Tensor

from metalearn.derivatives import nth_derivative
from metalearn.lessons.graph_drawing import nodes
from metalearn.lessons.lesson import (
    BLUE,
    GREEN,
    GREY,
    VERMILION,
    Check,
    Lesson,
    leaf,
    panels,
    source_of,
    value_or_error,
)

_CLAIM = """\
A gradient taken with create_graph=True is a tensor like any other, so its gradient can be taken too, to any order: \
x^3 at 2 has 12, 12, 6 and 0. Each call decides only about its own result: the second gradient can be differentiated \
only if the second call, too, was made with create_graph=True.

Where the derivatives end depends on how the function is written. x**3 gives its fourth derivative as a 0 without a \
graph and raises at the fifth; x * x * x gives its third, 6, without a graph and raises at the fourth. \
metalearn.derivatives.nth_derivative gives zeros in both cases.

A derivative's graph contains the graphs that it came from, and like terms are not merged. For e^x sin x, a product of \
two, the nodes more than double with every order, although n + 1 different terms would suffice; for sin x their number \
stays the same."""

_AT = 0.7
_ORDERS = 9


def nested(f: Callable[[Tensor], Tensor], at: float, order: int) -> list[Tensor]:
    """Return a function and its derivatives up to an order, by nested reverse mode."""
    x = leaf(at)
    derivatives = [f(x)]
    for _ in range(order):
        (following,) = torch.autograd.grad(derivatives[-1], x, create_graph=True)
        derivatives.append(following)
    return derivatives


def differentiable(*, first: bool, second: bool) -> tuple[bool, bool | None]:
    """Return whether the first and second derivative of x^3 carry a graph; None if there is no second."""
    x = leaf(2.0)
    (dy,) = torch.autograd.grad(x**3, x, create_graph=first)
    if not dy.requires_grad:
        return False, None
    (d2y,) = torch.autograd.grad(dy, x, create_graph=second)
    return dy.requires_grad, d2y.requires_grad


def twelfth_power(x: Tensor) -> Tensor:
    """Compute x^12; its n-th derivative is 12! / (12 - n)! x^(12 - n)."""
    return x**12


def spiral(x: Tensor) -> Tensor:
    """Compute e^x sin x; its n-th derivative is 2^(n/2) e^x sin(x + n pi/4)."""
    return torch.exp(x) * torch.sin(x)


def lesson() -> Lesson:
    """Run the lesson."""
    counts = {name: [len(nodes(d)) for d in nested(f, _AT, _ORDERS)] for name, f in _COUNTED.items()}
    return Lesson(
        title="orders: third, fourth and higher derivatives, and their price",
        claim=_CLAIM,
        code=source_of(leaf, nested, differentiable),
        checks=[*_cube(), *_against_formulas(), *_against_forward_mode(), *_growth(counts)],
        notes=[
            *(f"nodes by order, {name}: {', '.join(map(str, count))}" for name, count in counts.items()),
            *_seconds(),
        ],
        plots={"nodes_by_order": _plot(counts)},
    )


_COUNTED: dict[str, Callable[[Tensor], Tensor]] = {"e^x sin x": spiral, "tanh x": torch.tanh, "sin x": torch.sin}


def _cube() -> list[Check]:
    values = [d.item() for d in nested(lambda x: x**3, 2.0, 4)]
    neither, both, first_only = (
        differentiable(first=a, second=b) for a, b in ((False, False), (True, True), (True, False))
    )
    graphs = (("first", True, both[0]), ("first", False, neither[0]), ("second", True, both[1]))

    def product(x: Tensor) -> Tensor:
        return x * x * x

    fifth = value_or_error(lambda: nested(lambda x: x**3, 2.0, 5)[5])
    fourth = value_or_error(lambda: nested(product, 2.0, 4)[4])
    by_forward_mode = nth_derivative(product, torch.tensor(2.0, dtype=torch.float64), 4).item()
    return [
        *(Check(f"x^3 at 2, derivative {n}", values[n], known) for n, known in enumerate((12.0, 12.0, 6.0, 0.0), 1)),
        *(
            Check(f"{which} derivative has a graph, create_graph={flag}", str(found), str(flag))
            for which, flag, found in (*graphs, ("second", False, first_only[1]))
        ),
        Check("x**3, derivative 5", fifth, "RuntimeError", source="observed"),
        Check("x * x * x, derivative 4", fourth, "RuntimeError", source="observed"),
        Check("x * x * x, derivative 4 by nth_derivative", by_forward_mode, 0.0),
    ]


def _against_formulas() -> list[Check]:
    powers = [math.perm(12, n) * 2.0 ** (12 - n) for n in range(13)]
    sines = [math.sin(_AT + n * math.pi / 2) for n in range(13)]
    spirals = [2 ** (n / 2) * math.exp(_AT) * math.sin(_AT + n * math.pi / 4) for n in range(_ORDERS + 1)]
    worst = "largest relative error,"
    return [
        Check("x^12 at 2, derivative 12: 12!", nested(twelfth_power, 2.0, 12)[12].item(), 479_001_600.0),
        Check(f"{worst} x^12, orders 0 to 12", _error(nested(twelfth_power, 2.0, 12), powers), 0.0, 1e-12),
        Check(f"{worst} sin x at 0.7, orders 0 to 12", _error(nested(torch.sin, _AT, 12), sines), 0.0, 1e-12),
        Check("e^x at 0.7, derivative 12", nested(torch.exp, _AT, 12)[12].item(), math.exp(_AT), 1e-12),
        Check(f"{worst} e^x sin x, orders 0 to 9", _error(nested(spiral, _AT, _ORDERS), spirals), 0.0, 1e-12),
    ]


def _against_forward_mode() -> list[Check]:
    checks = []
    for name, f, at in (("x^12", twelfth_power, 2.0), ("e^x sin x", spiral, _AT), ("tanh x", torch.tanh, _AT)):
        forward = [nth_derivative(f, torch.tensor(at, dtype=torch.float64), n, mode="forward").item() for n in range(7)]
        what = f"largest relative difference to nth_derivative, {name}, orders 0 to 6"
        checks.append(Check(what, _error(nested(f, at, 6), forward), 0.0, 1e-11, source="nested forward mode"))
    return checks


def _error(derivatives: list[Tensor], known: list[float]) -> float:
    return max(abs(d.item() - k) / abs(k) for d, k in zip(derivatives, known, strict=True))


def _growth(counts: dict[str, list[int]]) -> list[Check]:
    spiral, sine = counts["e^x sin x"], counts["sin x"]
    doubled = all(after >= 2 * before for before, after in pairwise(spiral[1:]))
    return [
        Check("e^x sin x: nodes at least double with every order", str(doubled), "True", source="product rule"),
        Check("sin x: nodes at order 9, as at order 1", sine[9], sine[1], source="cos x again"),
    ]


def _seconds() -> list[str]:
    lines = []
    for name, f, at in (("x^12", twelfth_power, 2.0), ("e^x sin x", spiral, _AT)):
        x = torch.tensor(at, dtype=torch.float64)
        routes = partial(nested, f, at, 7), partial(nth_derivative, f, x, 7, mode="forward")
        ms = [1000 * timeit.timeit(route, number=1) for route in routes]
        lines.append(
            f"{name}, order 7: nested reverse mode {ms[0]:.2g} ms, nth_derivative (nested forward) {ms[1]:.2g} ms"
        )
    return lines


def _plot(counts: dict[str, list[int]]) -> Figure:
    figure, (axes,) = panels(1, width=7.5, height=4)
    orders = range(_ORDERS + 1)
    for (name, count), style in zip(
        counts.items(), ((VERMILION, "o", 3), (BLUE, "s", -3), (GREEN, "D", 0)), strict=True
    ):
        colour, marker, dy = style
        axes.plot(orders, count, color=colour, marker=marker, label=name.replace("^x", "ˣ"))
        axes.annotate(f"{count[-1]:,}", (_ORDERS, count[-1]), (9, dy), textcoords="offset points", va="center")
    axes.plot(orders, [4.0 * 2**n for n in orders], color=GREY, linestyle=":", label="4 · 2ⁿ, to compare")
    axes.set_yscale("log")
    axes.set_yticks([1, 10, 100, 1_000, 10_000], ["1", "10", "100", "1,000", "10,000"])
    axes.set_title("Nodes of each derivative's graph, nested reverse mode")
    axes.set(xlabel="order n of the derivative", ylabel="nodes in its graph", xlim=(-0.3, 10), ylim=(1, 12_000))
    axes.set_xticks(list(orders))
    axes.legend(frameon=False)
    return figure
