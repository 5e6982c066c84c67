"""Points that functions are differentiated at, the checks on them, and one forward or reverse pass."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import dual_level, make_dual
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from metalearn.core.functional import check_not_inference_mode
from metalearn.core.graph_checks import forbid_activation_checkpointing
from metalearn.core.operations import (
    FORWARD_MODE,
    NESTED,
    NESTED_TWICE,
    RUNNING_STATISTICS_ERROR,
    STATELESS,
    CorrectedOperations,
)
from metalearn.core.types import Params

Point = TypeVar("Point", Tensor, Params)
"""A Tensor or a dictionary of Tensors."""

ScalarFunction = Callable[[Any], Tensor]
"""From a point to a Tensor without dimensions."""


def as_scalar_function(f: ScalarFunction) -> ScalarFunction:
    """``f``, refused where it gives more than one number or changes the model that it calls."""

    def checked(x: Any) -> Tensor:
        # Attention by its formula, as the fused kernels have no second derivative.
        with (
            forbid_activation_checkpointing(),
            sdpa_kernel(SDPBackend.MATH),
            CorrectedOperations(STATELESS, {"add_": _add_}),
        ):
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


def as_input(name: str, x: Any) -> Any:
    """Return a point as a Tensor or a plain dictionary: ``state_dict()`` and ``ParameterDict`` become one.

    Raises:
        TypeError, ValueError: if it has no derivatives.
    """
    point = dict(x.items()) if isinstance(x, (Mapping, nn.ParameterDict)) else x
    check_point(name, point)
    return point


def check_point(name: str, x: object) -> None:
    """Refuse a point that has no derivatives."""
    check_not_inference_mode()
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


def check_direction(name: str, x: Any, v: Any) -> Any:
    """Return a direction shaped like the point, with its entries in the point's order.

    Raises:
        ValueError: if it is shaped otherwise.
    """
    v = as_input(name, v)
    shapes = [tree_map(lambda t: tuple(t.shape), tree) for tree in (x, v)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{name} must be shaped like x, {shapes[0]}, and is {shapes[1]}.")
    dtypes = [tree_map(lambda t: t.dtype, tree) for tree in (x, v)]
    if dtypes[0] != dtypes[1]:
        raise ValueError(f"{name} must have the dtype of x, {dtypes[0]}, and has {dtypes[1]}; convert it with .to().")
    return v if isinstance(v, Tensor) or isinstance(x, Tensor) else {key: v[key] for key in x}


def _add_(func: Any, counter: Any, *args: Any, **kwargs: Any) -> Any:
    if isinstance(counter, Tensor) and counter.ndim == 0 and not counter.is_floating_point():
        raise ValueError(RUNNING_STATISTICS_ERROR)  # BatchNorm counts its batches before it is called
    return func(counter, *args, **kwargs)


def vjp(f: Callable[[Any], Tensor], x: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Return the value and the pull-back, which may be called once and frees the activations as it comes to them.

    ``create_graph=True`` builds no graph here, as the transform has ended when the pull-back is called. It has torch
    take the formulas that are made to be differentiated: the others use what the forward pass has saved, an inverse
    or a factor, as constants, so that a tangent of them is lost.
    """
    value, pull_back, *_ = torch.func.vjp(f, x)
    return value, lambda cotangent: pull_back(cotangent, retain_graph=False, create_graph=True)[0]


def jvp(f: Callable[[Any], Any], x: Any, v: Any, *, has_aux: bool = False) -> Any:
    """``torch.func.jvp`` along v: value and derivative, and what else ``f`` returns."""
    _warm_up_forward_mode()
    point, direction = tree_map(Tensor.contiguous, x), tree_map(Tensor.contiguous, v)  # tangents are laid out alike
    return torch.func.jvp(f, (point,), (direction,), has_aux=has_aux)


def check_forward_mode_support(f: Callable[[Any], Tensor], *, nested: int = 0) -> Callable[[Any], Tensor]:
    """``f``, refused with ``NotImplementedError`` where forward mode would be wrong.

    That is in operations whose formulas are, and inside ``torch.no_grad()``: reverse mode takes what is computed there
    as constant; forward mode does not see it and goes on.

    Args:
        f: from a point to a Tensor.
        nested: how often the derivative by forward mode is differentiated once more.
    """
    wrong = (FORWARD_MODE, NESTED, NESTED_TWICE)[min(nested, 2)]
    table = {**wrong, "_set_grad_enabled": _stay_enabled}

    def watched(x: Any) -> Tensor:
        with torch.enable_grad(), CorrectedOperations(table):
            return f(x)

    return watched


def _stay_enabled(func: Any, enabled: bool) -> Any:
    if not enabled:
        raise NotImplementedError(
            "forward mode does not stop at torch.no_grad(), which this function enters; use .detach() on what is "
            "constant, or reverse mode"
        )
    return func(enabled)


@contextmanager
def refusing_by_name(mode: str) -> Iterator[None]:
    """Turn what torch's transforms cannot do into one error, which names the operation and a mode that can.

    Args:
        mode: how derivatives are taken, for the message.

    Raises:
        NotImplementedError: in place of torch's errors of several kinds.
    """
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        if not isinstance(error, NotImplementedError) and not re.search(_LIMITS_OF_TRANSFORMS, str(error)):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0].partition(" that does not support it")[0]
        if "saved tensor hooks" in reason:
            reason = "torch.utils.checkpoint inside of f does not go with torch.func's transforms"
        raise NotImplementedError(f"{reason.rstrip('.')}. ({mode})") from error


_LIMITS_OF_TRANSFORMS = (
    r"functorch|forward[- ](AD|mode|gradient)|saved tensor hooks|doesn't have storage|flat_bdims must not be None"
    r"|[Dd]erivative for .* (is )?not implemented|linalg_eig_backward"
)


@functools.cache
def _warm_up_forward_mode() -> None:
    """Torch loads some forward-mode formulas when they are first used, and warns of its own deprecations then."""
    with warnings.catch_warnings():
        for deprecation in (FutureWarning, DeprecationWarning):
            warnings.simplefilter("ignore", deprecation)
        with dual_level():
            make_dual(torch.zeros(()), torch.zeros(()))
