"""Compute Hessian-vector products in the time and memory of a few gradients, without the matrix.

    H v = d/dx <grad f(x), v> = d/dt grad f(x + t v) at t = 0          (Pearlmutter 1994)

The modes of ``derivatives.hvp`` are the orders in which the two derivatives can be taken.
"""

from __future__ import annotations

import math
import timeit
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from metalearn.core.profiling.memory import PeakTensorMemory
from metalearn.core.types import Params
from metalearn.derivatives import HVP_MODES, gradient, hessian, hvp
from metalearn.lessons.lesson import BLUE, GREY, VERMILION, Check, Lesson, panels, source_of, value_or_error

_DOUBLE = torch.float64
_X, _V = (1.0, math.pi / 2), (0.5, 1.0)

_CLAIM = """\
The Hessian of f(w) = w1^2 sin(w2) at (1, pi/2) is diag(2, -1), so its product with v = (0.5, 1) is (1, -1). Two \
lines of autograd give it: a gradient with create_graph=True, and the gradient of that gradient's inner product with \
v, which is what grad_outputs=v asks for. derivatives.hvp gives the same in three modes, for a Tensor or a \
dictionary. Second-order methods are often said to need the n x n matrix; most of them need only such products.

When to use which mode: forward_over_reverse is the default. It builds no graph of a gradient, so it keeps about a \
gradient's activations and their tangents, twice a gradient's memory on the network of the notes. \
reverse_over_reverse needs only a backward pass that can be differentiated: use it where an operation has no \
forward-mode formula (both other modes raise there), or where the tensors are so small that the overhead of \
torch.func matters. reverse_over_forward differentiates the slope d/dt f(x + t v): use it where you have that slope \
anyway, as in a penalty on a directional derivative. It supports less than the others: torch's forward-mode formulas \
of LayerNorm, BatchNorm, solve, det and others cannot be differentiated, and it raises an error that names them. No \
mode is the fastest or the smallest everywhere: the notes, and the lesson big_product, give the measurements."""


def f(w: Tensor) -> Tensor:
    """Compute w1^2 sin(w2), whose Hessian is [[2 sin w2, 2 w1 cos w2], [2 w1 cos w2, -w1^2 sin w2]]."""
    return w[0] ** 2 * torch.sin(w[1])


def f_of_dict(w: Params) -> Tensor:
    """Compute the same function of two named parameters."""
    return w["w1"] ** 2 * torch.sin(w["w2"])


def two_lines(x: Tensor, v: Tensor) -> Tensor:
    """Compute the product in two lines of plain autograd; ``x`` must require grad."""
    (grads,) = torch.autograd.grad(f(x), x, create_graph=True)
    (product,) = torch.autograd.grad(grads, x, grad_outputs=v)
    return product


class Cube(torch.autograd.Function):
    """x^3 with a backward pass and without ``jvp``, which forward mode needs."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        """Return the value."""
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Save x for the backward pass."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Return 3 x^2 times the incoming gradient by torch operations, which can be differentiated again."""
        x: Tensor = ctx.saved_tensors[0]
        return 3 * x**2 * grad


def lesson() -> Lesson:
    """Run the lesson."""
    x, v = torch.tensor(_X, dtype=_DOUBLE), torch.tensor(_V, dtype=_DOUBLE)
    return Lesson(
        title="Hessian-vector products",
        claim=_CLAIM,
        code=source_of(f, two_lines),
        checks=[*_derivatives(x), *_products(x, v), *_without_forward_formula()],
        notes=_costs(),
        plots={"hvp": _plot(x, v)},
    )


def _derivatives(x: Tensor) -> list[Check]:
    grad, h = gradient(f, x).tolist(), hessian(f, x).tolist()
    known = [[2.0, 0.0], [0.0, -1.0]]
    return [
        *(Check(f"gradient, entry {i + 1}", grad[i], g, 1e-12) for i, g in enumerate((2.0, 0.0))),
        *(Check(f"Hessian, entry {i + 1}{j + 1}", h[i][j], known[i][j], 1e-12) for i in (0, 1) for j in (0, 1)),
    ]


def _products(x: Tensor, v: Tensor) -> list[Check]:
    found = {"two lines": two_lines(x.clone().requires_grad_(), v)}
    named = [{"w1": t[0], "w2": t[1]} for t in (x, v)]
    for mode in HVP_MODES:
        found[f"{mode}, Tensor"] = hvp(f, x, v, mode=mode)
        found[f"{mode}, dict"] = torch.stack(list(hvp(f_of_dict, named[0], named[1], mode=mode).values()))
    return [
        Check(f"H v by {way}, entry {i + 1}", product[i].item(), (1.0, -1.0)[i], 1e-12)
        for way, product in found.items()
        for i in (0, 1)
    ]


def _without_forward_formula() -> list[Check]:
    """Check which modes pass an operation without ``jvp``: sum x^3 at 1 along 1, where H v = 6."""
    one, checks = torch.ones(1, dtype=_DOUBLE), []
    for mode in HVP_MODES:
        outcome = value_or_error(partial(hvp, lambda x: Cube.apply(x).sum(), one, one, mode=mode))
        expected = 6.0 if mode == "reverse_over_reverse" else "NotImplementedError"
        checks.append(Check(f"sum x^3 without a forward-mode formula, {mode}", outcome, expected, 1e-12))
    return checks


def _costs() -> list[str]:
    """Measure time and peak memory on a small network, relative to one gradient."""
    x = torch.randn(1024, 256)
    theta = {f"layer {i}": torch.randn(256, 256) / 16 for i in range(4)}
    v = {name: torch.randn(p.shape) for name, p in theta.items()}

    def loss(p: Params) -> Tensor:
        hidden = x
        for weight in p.values():
            hidden = torch.tanh(hidden @ weight)
        return hidden.square().mean()

    def cost(compute: Callable[[], object]) -> tuple[float, int]:
        with PeakTensorMemory() as live:
            compute()
        return min(timeit.repeat(compute, number=1, repeat=4)), live.peak

    seconds, peak = cost(partial(gradient, loss, theta))
    network = f"tanh network of {sum(p.numel() for p in theta.values()):,} parameters, 1,024 examples"
    notes = [f"{network}: gradient in {1000 * seconds:.0f} ms and {peak / 1e6:.1f} MB"]
    for mode in HVP_MODES:
        took, used = cost(partial(hvp, loss, theta, v, mode=mode))
        notes.append(f"{mode}: {took / seconds:.1f} times a gradient's time, {used / peak:.2f} times its peak memory")
    return notes


def _plot(x: Tensor, v: Tensor) -> Figure:
    figure, (plane, along) = panels(2, width=10, height=4)
    w1, w2 = torch.meshgrid(torch.linspace(0, 2.4, 81), torch.linspace(0, 3.2, 81), indexing="ij")
    levels = [0.25, 0.5, 1, 2, 3, 4]
    plane.clabel(plane.contour(w1, w2, f(torch.stack([w1, w2])), levels, colors=GREY, linewidths=0.8), fmt="%g")
    start, product = _X, hvp(f, x, v)
    for arrow, colour, name in ((v, BLUE, "v"), (product, VERMILION, "H v")):
        end = (start[0] + arrow[0].item(), start[1] + arrow[1].item())
        plane.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 2})
        plane.text((start[0] + end[0]) / 2 + 0.08, (start[1] + end[1]) / 2 + 0.03, name, color=colour, fontsize=12)
    plane.plot(*start, "ko")
    plane.set(xlabel="$w_1$", ylabel="$w_2$", title=r"contours of $w_1^2\,\sin w_2$, and the point $(1, \pi/2)$")

    t = torch.linspace(-0.5, 0.5, 41, dtype=_DOUBLE)
    grads = torch.stack([gradient(f, x + s * v) for s in t])
    for i, colour in enumerate((BLUE, VERMILION)):
        slope = product[i].item()
        along.plot(t, grads[:, i], color=colour, label=rf"$\partial f/\partial w_{i + 1}$ at $x + t\,v$")
        along.plot(t, grads[20, i] + slope * t, "--", color=colour, label=f"slope $(H v)_{i + 1} = {slope:.0f}$")
    along.set(xlabel="$t$", ylabel="entry of the gradient", title="$H v$ is how the gradient changes along $v$")
    along.legend(frameon=False)
    return figure
