"""Points that functions are differentiated at, the checks on them, and one forward or reverse pass."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.forward_ad import dual_level, make_dual
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from metalearn.params import refuse_inference_mode
from metalearn.types import Params

Point = TypeVar("Point", Tensor, Params)
"""A Tensor or a dictionary of Tensors."""

ScalarFunction = Callable[[Any], Tensor]
"""From a point to a Tensor without dimensions."""


def scalar(f: ScalarFunction) -> ScalarFunction:
    """``f``, refused where it gives more than one number."""

    def checked(x: Any) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            value = f(x)
        if isinstance(value, Tensor) and value.is_complex():
            raise ValueError(f"f gave {value.dtype} and must give a real number; take its .real or .abs().")
        if not isinstance(value, Tensor) or value.ndim != 0:
            shown = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"f gave {shown} and must give a scalar, a Tensor without dimensions; reduce it with .sum() or .mean()."
            )
        return value

    return checked


def check_point(name: str, x: object) -> None:
    """Refuse a point that has no derivatives."""
    refuse_inference_mode()
    tensors = x if isinstance(x, dict) else {"": x}
    if not tensors:
        raise ValueError(f"{name} is an empty dictionary: there is nothing to differentiate in.")
    for key, tensor in tensors.items():
        place = f"{name}[{key!r}]" if isinstance(x, dict) else name
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{place} is {type(tensor).__name__}; give a Tensor or a dictionary of Tensors.")
        if tensor.is_complex():
            raise TypeError(
                f"{place} is {tensor.dtype}: derivatives are taken in real numbers. Give torch.view_as_real({name}), "
                "and let the function compute with torch.view_as_complex of it."
            )
        if not tensor.is_floating_point():
            raise TypeError(
                f"{place} is {tensor.dtype}: only floating-point tensors have derivatives. Convert it with .float() or "
                ".double(), or close over it as a constant."
            )


def check_direction(name: str, x: Point, v: Point) -> Point:
    """A direction shaped like the point, with its entries in the point's order.

    Raises:
        ValueError: if it is shaped otherwise.
    """
    check_point(name, v)
    shapes = [tree_map(lambda t: tuple(t.shape), tree) for tree in (x, v)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{name} must be shaped like x, {shapes[0]}, and is {shapes[1]}.")
    return v if isinstance(v, Tensor) or isinstance(x, Tensor) else {key: v[key] for key in x}


def vjp(f: Callable[[Any], Tensor], x: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Value and pull-back; the pull-back may be called once, and frees the activations as it comes to them."""
    value, pull_back, *_ = torch.func.vjp(f, x)
    return value, lambda cotangent: pull_back(cotangent, retain_graph=False, create_graph=False)[0]


def jvp(f: Callable[[Any], Any], x: Any, v: Any, *, has_aux: bool = False) -> Any:
    """``torch.func.jvp`` along v: value and derivative, and what else ``f`` returns."""
    _load_forward_mode()
    point, direction = tree_map(Tensor.contiguous, x), tree_map(Tensor.contiguous, v)  # tangents are laid out alike
    return torch.func.jvp(f, (point,), (direction,), has_aux=has_aux)


def fit_for_forward_mode(f: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    """``f``, refused with ``NotImplementedError`` where it enters ``torch.no_grad()``.

    Reverse mode takes what is computed there as constant; forward mode does not see it and goes on.
    """

    def watched(x: Any) -> Tensor:
        with torch.enable_grad(), _GradientsStayOn():
            return f(x)

    return watched


class _GradientsStayOn(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._C._set_grad_enabled and args[0] is False:
            raise NotImplementedError(
                "forward mode does not stop at torch.no_grad(), which this function enters; use .detach() on what is "
                "constant, or reverse mode"
            )
        return func(*args, **(kwargs or {}))


@functools.cache
def _load_forward_mode() -> None:
    """Torch loads some forward-mode formulas when they are first used, and warns of its own deprecations then."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        with dual_level():
            make_dual(torch.zeros(()), torch.zeros(()))
