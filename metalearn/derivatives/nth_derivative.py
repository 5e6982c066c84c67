"""Compute derivatives of any order in one variable."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from metalearn.core.operations import THIRD_ORDER, CorrectedOperations
from metalearn.derivatives.inputs import (
    Input,
    as_input,
    as_scalar_function,
    check_direction,
    check_forward_mode_support,
    explain_unsupported,
    jvp,
)


def nth_derivative(
    f: Callable[[Any], Tensor], x: Input, order: int, *, along: Input | None = None, mode: str = "reverse"
) -> Tensor:
    """Return the n-th derivative of a function of one variable, or along one direction.

        along=None:  the n-th derivative of f at every entry of the Tensor x
        along=v:     d^n/dt^n f(x + t v) at t = 0, for a Tensor or a dictionary

    Nested reverse mode takes a gradient with a graph for each order; nested forward mode needs no graph. The cost grows
    about as 2^n in both, and is much smaller in reverse mode.

    Args:
        f: maps one number (a Tensor without dimensions) to one number; with ``along`` it maps ``x`` to a scalar.
        x: where to differentiate.
        order: n, at least 0; 0 is ``f`` itself.
        along: direction, shaped like ``x``.
        mode: ``"reverse"`` or ``"forward"``.

    Returns:
        Shaped like ``x`` with ``along=None``, else a scalar. Zeros where nothing depends on x any more.

    Raises:
        ValueError: for an order that is not a whole number from 0, a dictionary without ``along``, a function that
            returns several numbers, or an unknown mode.
        TypeError: if ``x`` holds anything but floating-point tensors.

    Examples:
        >>> nth_derivative(lambda x: x**3, torch.tensor(2.0), order=2)
        tensor(12.)
    """
    if not isinstance(order, int) or isinstance(order, bool) or order < 0:
        raise ValueError(f"nth_derivative: order={order!r}; it must be a whole number, 0 or more.")
    if mode not in _MODES:
        raise ValueError(f"nth_derivative: mode={mode!r} is not one of {', '.join(_MODES)}.")
    x = as_input("x", x)
    if along is not None:
        direction, value = check_direction("along", x, along), as_scalar_function(f)
        start = torch.zeros((), dtype=tree_flatten(x)[0][0].dtype, device=tree_flatten(x)[0][0].device)
        return _MODES[mode](lambda t: value(tree_map(lambda a, v: a + t * v, x, direction)), start, order)
    if not isinstance(x, Tensor):
        raise ValueError("nth_derivative: x is a dictionary; say along which direction with along=v.")
    entries = x.detach().reshape(-1)
    return _MODES[mode](torch.vmap(_check_scalar_input(f)), entries, order).reshape(x.shape)


def _reverse(values: Callable[[Tensor], Tensor], t: Tensor, order: int) -> Tensor:
    """Differentiate the sum of the values, each of which depends on its own entry of t only."""
    with torch.enable_grad():
        at = t.detach().clone().requires_grad_()
        with CorrectedOperations(THIRD_ORDER if order > 2 else {}):
            derivative = values(at)
        for _ in range(order):
            if not derivative.requires_grad:
                return torch.zeros_like(t)
            (derivative,) = torch.autograd.grad(derivative.sum(), at, create_graph=True, materialize_grads=True)
    return derivative.detach()


def _forward(values: Callable[[Tensor], Tensor], t: Tensor, order: int) -> Tensor:
    derivative = check_forward_mode_support(values, nested=order - 1)
    for _ in range(order):
        derivative = partial(_directional_derivative, derivative)
    with explain_unsupported(
        "nth_derivative's mode='forward' differentiates forward-mode formulas; take mode='reverse'"
    ):
        return derivative(t).detach()


def _directional_derivative(f: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    return jvp(f, t, torch.ones_like(t))[1]


_MODES = {"reverse": _reverse, "forward": _forward}


def _check_scalar_input(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def checked(t: Tensor) -> Tensor:
        with CorrectedOperations():
            value = f(t)
        if not isinstance(value, Tensor):
            raise ValueError(f"nth_derivative: f gave {type(value).__name__} and must give a Tensor.")
        if value.ndim != 0:
            raise ValueError(
                f"nth_derivative: f maps one number to a tensor of shape {tuple(value.shape)} and must map it to one "
                "number; for a function of several variables give a direction with along=v."
            )
        return value

    return checked
