"""Points that functions are differentiated at, the checks on them, and one forward or reverse pass."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.forward_ad import dual_level, make_dual
from torch.utils._pytree import tree_map

from metalearn.types import Params

Point = TypeVar("Point", Tensor, Params)
"""A Tensor or a dictionary of Tensors."""

ScalarFunction = Callable[[Any], Tensor]
"""From a point to a Tensor without dimensions."""


def scalar(f: ScalarFunction) -> ScalarFunction:
    """``f``, refused where it gives more than one number."""

    def checked(x: Any) -> Tensor:
        value = f(x)
        if not isinstance(value, Tensor) or value.ndim != 0:
            shown = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"f gave {shown} and must give a scalar, a Tensor without dimensions; reduce it with .sum() or .mean()."
            )
        return value

    return checked


def check_point(name: str, x: object) -> None:
    """Refuse a point that has no derivatives."""
    tensors = x if isinstance(x, dict) else {"": x}
    if not tensors:
        raise ValueError(f"{name} is an empty dictionary: there is nothing to differentiate in.")
    for key, tensor in tensors.items():
        place = f"{name}[{key!r}]" if isinstance(x, dict) else name
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{place} is {type(tensor).__name__}; give a Tensor or a dictionary of Tensors.")
        if not tensor.is_floating_point():
            raise TypeError(
                f"{place} is {tensor.dtype}: only floating-point tensors have derivatives. Convert it with .float() or "
                ".double(), or close over it as a constant."
            )


def check_direction(x: Any, v: object) -> None:
    """Refuse a direction that is not shaped like the point."""
    check_point("v", v)
    shapes = [tree_map(lambda t: tuple(t.shape), tree) for tree in (x, v)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"v must be shaped like x, {shapes[0]}, and is {shapes[1]}.")


def vjp(f: Callable[[Any], Tensor], x: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Value and pull-back; the pull-back may be called once, and frees the activations as it comes to them."""
    value, pull_back, *_ = torch.func.vjp(f, x)
    return value, lambda cotangent: pull_back(cotangent, retain_graph=False, create_graph=False)[0]


def jvp(f: Callable[[Any], Any], x: Any, v: Any) -> tuple[Any, Any]:
    """Value and derivative along v. Forward mode lays tangents out as their primals, which must not be expanded."""
    _load_forward_mode()
    value, slope, *_ = torch.func.jvp(f, (tree_map(Tensor.contiguous, x),), (tree_map(Tensor.contiguous, v),))
    return value, slope


@functools.cache
def _load_forward_mode() -> None:
    """Torch loads some forward-mode formulas when they are first used, and warns of its own deprecations then."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        with dual_level():
            make_dual(torch.zeros(()), torch.zeros(()))
