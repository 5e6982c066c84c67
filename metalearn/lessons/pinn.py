"""Solve a differential equation with a network, by derivatives in its input that are differentiated in its weights.

    u'' = -u on [0, 2 pi],  u(0) = 0,  u'(0) = 1,  so  u = sin x
    L(theta) = mean_i (u''(x_i) + u(x_i))^2 + u(0)^2 + (u'(0) - 1)^2

This is a physics-informed network: Raissi, Perdikaris & Karniadakis 2019, J. Comput. Phys. 378. The loss holds a second
derivative, so its gradient in theta is a third one; with ReLU the second is zero.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor

from metalearn.core.types import Params
from metalearn.derivatives import nth_derivative
from metalearn.lessons.lesson import BLUE, GREY, VERMILION, Check, Lesson, panels, source_of, yes_or_no

Activation = Callable[[Tensor], Tensor]
_END, _WIDTH = 2 * math.pi, 20

_CLAIM = """\
create_graph=True twice gives u'' of a network as a tensor that can be part of a loss. A network of two layers of 20 \
tanh units learns u'' = -u, u(0) = 0, u'(0) = 1, without a single value of sin x, to better than 1e-3 everywhere on \
[0, 2 pi]; this is checked on a grid finer than the training points.

With ReLU no error is raised and nothing is learnt. The network is piecewise linear, so autograd's u'' is exactly 0 \
at every point and the residual u'' + u is u itself: training drives u towards 0, except for kinks near x = 0 that \
satisfy the initial conditions. Its loss falls nevertheless. A small loss is no sign of a solution if the loss does \
not contain the equation."""


@dataclass(frozen=True)
class Fit:
    """A trained network on a fine grid."""

    x: Tensor
    u: Tensor
    u_xx: Tensor
    theta: Params
    loss: float
    seconds: float

    @property
    def error(self) -> Tensor:
        """Distance from sin x at every grid point."""
        return (self.u - self.x.sin()).abs()


def network(theta: Params, x: Tensor, activation: Activation) -> Tensor:
    """Compute u at each of the points ``x`` by two hidden layers; ``[points]`` to ``[points]``."""
    hidden = activation(x[..., None] @ theta["w1"] + theta["b1"])
    hidden = activation(hidden @ theta["w2"] + theta["b2"])
    return (hidden @ theta["w3"])[..., 0]


def with_derivatives(theta: Params, x: Tensor, activation: Activation) -> tuple[Tensor, ...]:
    """Return u, u' and u'' at the points; all three can be differentiated in theta."""
    x = x.clone().requires_grad_()
    u = network(theta, x, activation)
    # Each u depends only on its own x, so the gradient of the sum has every point's derivative.
    (u_x,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (u_xx,) = torch.autograd.grad(u_x.sum(), x, create_graph=True)
    return u, u_x, u_xx


def equation(theta: Params, x: Tensor, activation: Activation) -> Tensor:
    """Compute the loss: the residual at the points, and the two initial conditions at the first one, x = 0."""
    u, u_x, u_xx = with_derivatives(theta, x, activation)
    return (u_xx + u).square().mean() + u[0].square() + (u_x[0] - 1).square()


def train(activation: Activation) -> Fit:
    """Fit by L-BFGS, in float64."""
    began, draw = time.perf_counter(), torch.Generator().manual_seed(1)
    shapes = {"w1": (1, _WIDTH), "b1": (_WIDTH,), "w2": (_WIDTH, _WIDTH), "b2": (_WIDTH,), "w3": (_WIDTH, 1)}
    scales = {"w1": 1.0, "b1": 1.0, "w2": _WIDTH**-0.5, "b2": 0.0, "w3": _WIDTH**-0.5}
    theta = {
        name: (torch.randn(shape, generator=draw, dtype=torch.float64) * scales[name]).requires_grad_()
        for name, shape in shapes.items()
    }
    x = torch.linspace(0, _END, 128, dtype=torch.float64)
    weights = list(theta.values())
    optimiser = torch.optim.LBFGS(
        weights,
        max_iter=1000,
        history_size=50,
        tolerance_grad=1e-9,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        loss = equation(theta, x, activation)
        for weight, grad in zip(weights, torch.autograd.grad(loss, weights, materialize_grads=True), strict=True):
            weight.grad = grad
        return loss.detach()

    optimiser.step(closure)
    fine = torch.linspace(0, _END, 1001, dtype=torch.float64)
    u, _, u_xx = (t.detach() for t in with_derivatives(theta, fine, activation))
    done = {name: weight.detach() for name, weight in theta.items()}
    return Fit(fine, u, u_xx, done, closure().item(), time.perf_counter() - began)


def lesson() -> Lesson:
    """Run the lesson."""
    smooth, kinked = train(torch.tanh), train(torch.relu)
    return Lesson(
        title="A network that solves u'' = -u",
        claim=_CLAIM,
        code=source_of(network, with_derivatives, equation),
        checks=_checks(smooth, kinked),
        notes=[
            f"{name}: loss {fit.loss:.1e}, largest error {fit.error.max():.1e}, in {fit.seconds:.1f} s"
            for name, fit in (("tanh", smooth), ("ReLU", kinked))
        ],
        plots={"pinn": _plot(smooth, kinked)},
    )


def _checks(smooth: Fit, kinked: Fit) -> list[Check]:
    nested_forward = nth_derivative(lambda x: network(smooth.theta, x, torch.tanh), smooth.x, 2, mode="forward")
    forward_error = (smooth.u_xx - nested_forward).abs().max().item()
    residual, value = ((t.square().mean().sqrt().item()) for t in (kinked.u_xx + kinked.u, kinked.u))
    far = yes_or_no(kinked.error.max().item() > 0.5)
    return [
        Check("tanh: largest |u - sin x| on [0, 2 pi]", smooth.error.max().item(), 0.0, 1e-3),
        Check("tanh: largest |u'' + u|", (smooth.u_xx + smooth.u).abs().max().item(), 0.0, 0.05),
        Check("tanh: largest |u'' - nth_derivative|", forward_error, 0.0, 1e-9, "forward mode"),
        Check("ReLU: largest |u''|", kinked.u_xx.abs().max().item(), 0.0),
        Check("ReLU: root mean square of u'' + u over that of u", residual / value, 1.0, 1e-12),
        Check("ReLU: largest |u - sin x| is above 0.5", far, "yes", source="measured"),
    ]


def _plot(smooth: Fit, kinked: Fit) -> Figure:
    figure, (solution, error) = panels(2, width=10, height=4)
    solution.plot(smooth.x, smooth.x.sin(), color=GREY, linewidth=5, alpha=0.5, label="sin x")
    for fit, colour, style, name in ((smooth, BLUE, "-", "tanh network"), (kinked, VERMILION, "--", "ReLU network")):
        solution.plot(fit.x, fit.u, style, color=colour, label=name)
        error.semilogy(fit.x, fit.error, style, color=colour, label=name)
    solution.set(xlabel="x", ylabel="u", title="solution")
    error.set(xlabel="x", ylabel="|u - sin x|", title="error", ylim=(1e-8, 10))
    solution.legend(frameon=False)
    return figure
