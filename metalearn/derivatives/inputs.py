"""Check functions and their inputs, and take one derivative by reverse or forward mode."""

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

from metalearn.core.graph_checks import forbid_activation_checkpointing
from metalearn.core.operations import (
    FORWARD_MODE,
    NESTED,
    NESTED_TWICE,
    RUNNING_STATISTICS_ERROR,
    STATELESS,
    CorrectedOperations,
    Handler,
)
from metalearn.core.params import check_not_inference_mode
from metalearn.core.threads import one_thread_at_a_time
from metalearn.core.types import Params

Input = TypeVar("Input", Tensor, Params)
"""A Tensor or a dictionary of Tensors."""

ScalarFunction = Callable[[Any], Tensor]
"""Maps an input to a Tensor without dimensions."""


def as_scalar_function(f: ScalarFunction, operations: Mapping[str, Handler] | None = None) -> ScalarFunction:
    """Return ``f`` with ``operations`` replaced, raising if it gives several numbers or changes the model it calls."""

    def checked(x: Any) -> Tensor:
        # Attention by its formula, as the fused kernels have no second derivative.
        with (
            one_thread_at_a_time(),
            forbid_activation_checkpointing(),
            sdpa_kernel(SDPBackend.MATH),
            CorrectedOperations(STATELESS, {"add_": _add_inplace}, operations or {}),
        ):
            value = f(x)
        if isinstance(value, Tensor) and value.is_complex():
            raise ValueError(f"f gave {value.dtype} and must give a real number; take its .real or .abs().")
        if not isinstance(value, Tensor) or value.ndim != 0:
            kind = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"f gave {kind} and must give a scalar, a Tensor without dimensions; reduce it with .sum() or .mean()."
            )
        return value

    return checked


def as_input(name: str, x: Any) -> Any:
    """Return an input as a Tensor or a plain dictionary, made of a ``state_dict()`` or a ``ParameterDict``.

    Raises:
        TypeError, ValueError: if it is not made of floating-point tensors, or is empty.
    """
    if isinstance(x, (Mapping, nn.ParameterDict)):
        x = dict(x.items())
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
    return x


def check_direction(name: str, x: Any, v: Any) -> Any:
    """Return a direction with its entries in the order of ``x``; raise ``ValueError`` if shapes or dtypes differ."""
    v = as_input(name, v)
    shapes = [tree_map(lambda t: tuple(t.shape), tree) for tree in (x, v)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{name} must be shaped like x, {shapes[0]}, and is {shapes[1]}.")
    dtypes = [tree_map(lambda t: t.dtype, tree) for tree in (x, v)]
    if dtypes[0] != dtypes[1]:
        raise ValueError(f"{name} must have the dtype of x, {dtypes[0]}, and has {dtypes[1]}; convert it with .to().")
    return v if isinstance(v, Tensor) or isinstance(x, Tensor) else {key: v[key] for key in x}


def _add_inplace(func: Any, counter: Any, *args: Any, **kwargs: Any) -> Any:
    if isinstance(counter, Tensor) and counter.ndim == 0 and not counter.is_floating_point():
        raise ValueError(RUNNING_STATISTICS_ERROR)  # BatchNorm counts its batches before it is called
    return func(counter, *args, **kwargs)


def vjp(f: Callable[[Any], Tensor], x: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Return the value and the vector-Jacobian product, which can be called once and frees each activation after use.

    ``create_graph=True`` builds no graph here, as the transform has ended by then. It makes torch take its
    differentiable formulas: the others treat results saved by the forward pass, such as an inverse, as constants, so
    that their tangents would be lost.
    """
    value, vjp_fn, *_ = torch.func.vjp(f, x)
    return value, lambda cotangent: vjp_fn(cotangent, retain_graph=False, create_graph=True)[0]


@one_thread_at_a_time()
def jvp(f: Callable[[Any], Any], x: Any, v: Any, *, has_aux: bool = False) -> Any:
    """Return the value and the derivative along v by ``torch.func.jvp``, and the auxiliary output of ``f``."""
    _warm_up_forward_mode()
    x, v = tree_map(Tensor.contiguous, x), tree_map(Tensor.contiguous, v)  # a tangent needs the layout of its primal
    return torch.func.jvp(f, (x,), (v,), has_aux=has_aux)


def check_forward_mode_support(f: Callable[[Any], Tensor], *, nested: int = 0) -> Callable[[Any], Tensor]:
    """Return ``f``, raising ``NotImplementedError`` where its forward-mode derivative would be wrong.

    That is in operations with wrong formulas, of which some are wrong only if the derivative is differentiated
    ``nested`` more times, and inside ``torch.no_grad()``: reverse mode treats what is computed there as constant,
    forward mode does not.
    """
    wrong = (FORWARD_MODE, NESTED, NESTED_TWICE)[min(nested, 2)]
    table = {**wrong, "_set_grad_enabled": _forbid_no_grad}

    def checked(x: Any) -> Tensor:
        with torch.enable_grad(), CorrectedOperations(table):
            return f(x)

    return checked


def _forbid_no_grad(func: Any, enabled: bool) -> Any:
    if not enabled:
        raise NotImplementedError(
            "forward mode does not stop at torch.no_grad(), which this function enters; use .detach() on what is "
            "constant, or reverse mode"
        )
    return func(enabled)


@contextmanager
def explain_unsupported(mode: str) -> Iterator[None]:
    """Turn errors of torch's transforms into one ``NotImplementedError`` that names the operation.

    ``mode`` says how derivatives are taken and what to use instead.
    """
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        if not isinstance(error, NotImplementedError) and not re.search(_UNSUPPORTED, str(error)):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0].partition(" that does not support it")[0]
        if "saved tensor hooks" in reason:
            reason = "torch.utils.checkpoint inside of f does not go with torch.func's transforms"
        raise NotImplementedError(f"{reason.rstrip('.')}. ({mode})") from error


_UNSUPPORTED = (
    r"functorch|forward[- ](AD|mode|gradient)|saved tensor hooks|doesn't have storage|flat_bdims must not be None"
    r"|[Dd]erivative for .* (is )?not implemented|linalg_eig_backward"
)


@functools.cache
def _warm_up_forward_mode() -> None:
    """Load torch's forward-mode formulas without the deprecation warnings that their first use emits."""
    with warnings.catch_warnings():
        for deprecation in (FutureWarning, DeprecationWarning):
            warnings.simplefilter("ignore", deprecation)
        with dual_level():
            make_dual(torch.zeros(()), torch.zeros(()))
