"""Derivatives of any order in one variable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from metalearn.derivatives.points import Point, check_direction, check_point, jvp


def nth_derivative(f: Callable[[Any], Tensor], x: Point, order: int, *, along: Point | None = None) -> Tensor:
    """The n-th derivative in one variable, by nested forward mode (its cost grows as 2^n, its memory with n).

        along=None:  f'..'(x), a function of one variable, taken at every entry of the Tensor x
        along=v:     d^n/dt^n f(x + t v) at t = 0, for a Tensor or a dictionary

    Args:
        f: with ``along=None``, from one number (a Tensor without dimensions) to one number; else from a point to a
            Tensor.
        x: where.
        order: n, at least 0; 0 is ``f`` itself.
        along: direction, shaped like ``x``.

    Returns:
        Shaped like ``x`` with ``along=None``, else like ``f(x)``.

    Raises:
        ValueError: for an order that is not a whole number from 0, or a dictionary without ``along``.
        TypeError: if ``x`` holds other than floating-point tensors.

    Example:
        >>> nth_derivative(lambda x: x**3, torch.tensor(2.0), order=2)
        tensor(12.)
    """
    if not isinstance(order, int) or isinstance(order, bool) or order < 0:
        raise ValueError(f"nth_derivative: order={order!r}; it must be a whole number, 0 or more.")
    check_point("x", x)
    if along is not None:
        check_direction(x, along)
        direction = along
        first = tree_flatten(x)[0][0]
        line = _differentiated(lambda t: f(tree_map(lambda a, v: a + t * v, x, direction)), order)
        return line(torch.zeros((), dtype=first.dtype, device=first.device))
    if not isinstance(x, Tensor):
        raise ValueError("nth_derivative: x is a dictionary; say along which direction with along=v.")
    values: Tensor = torch.vmap(_differentiated(f, order))(x.reshape(-1))
    if values.shape != (x.numel(),):
        raise ValueError(
            f"nth_derivative: f maps one number to a tensor of shape {tuple(values.shape[1:])} and must map it to one "
            "number; for a function of several variables give a direction with along=v."
        )
    return values.reshape(x.shape)


def _differentiated(f: Callable[[Tensor], Tensor], order: int) -> Callable[[Tensor], Tensor]:
    if order == 0:
        return f

    return _differentiated(lambda t: jvp(f, t, torch.ones_like(t))[1], order - 1)
