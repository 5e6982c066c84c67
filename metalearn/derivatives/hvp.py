"""Compute products with second-derivative matrices, which are never formed, at the cost of a few gradients.

hvp:               H v = d/dt grad f(x + t v) at t = 0                (Pearlmutter 1994)
gauss_newton_vp:   G v = J^T (d2 loss / dz2) J v,  z = model(x)       (Schraudolph 2002)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from metalearn.core.graph_checks import check_twice_differentiable
from metalearn.core.operations import SECOND_DERIVATIVE, CorrectedOperations
from metalearn.core.params import check_finite, is_finite
from metalearn.derivatives.inputs import (
    Input,
    ScalarFunction,
    as_input,
    as_scalar_function,
    check_direction,
    check_forward_mode_support,
    explain_unsupported,
    jvp,
    vjp,
)
from metalearn.derivatives.singular import two_sided_limit


def gradient(f: ScalarFunction, x: Input) -> Input:
    """Return df/dx by reverse mode, freeing each activation after its use.

    ``torch.func.grad`` keeps them and a graph of the gradient, so that reverse mode can be nested. This function can
    only be nested in forward mode.

    Raises:
        ValueError: if ``f`` does not return a scalar.
        TypeError: if ``x`` holds anything but floating-point tensors.
    """
    value, vjp_fn = vjp(as_scalar_function(f), as_input("x", x))
    return vjp_fn(torch.ones_like(value))


def hvp(f: ScalarFunction, x: Input, v: Input, *, mode: str = "forward_over_reverse") -> Input:
    """Return the Hessian-vector product H v of a scalar function ``f`` at ``x``, in the memory of a few gradients.

        forward_over_reverse:  d/dt grad f(x + t v)           no graph of a gradient: the least memory on deep networks
        reverse_over_reverse:  d/dx <grad f(x), v>            needs no forward-mode formulas
        reverse_over_forward:  d/dx (d/dt f(x + t v))         needs no second derivative of a backward formula

    Returns:
        H v, shaped like ``x``; detached.

    Raises:
        ValueError: if ``f`` does not return a scalar, ``v`` is not shaped like ``x``, or the mode is unknown.
        TypeError: if ``x`` or ``v`` holds anything but floating-point tensors.
        NotImplementedError: in the modes that use forward mode, if an operation lacks a formula for it, or if ``f``
            enters ``torch.no_grad()``, which forward mode does not see.

    Examples:
        >>> x, v = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0])
        >>> hvp(lambda x: x[0] ** 2 * x[1], x, v)
        tensor([4., 2.])

    Reference: Pearlmutter 1994, "Fast exact multiplication by the Hessian".
    """
    value, product = value_and_hvp(f, x, v, mode=mode)
    if torch._C._are_functorch_transforms_active() or is_finite(product) or not torch.isfinite(value):
        return product  # values cannot be read inside a transform; and where f is not finite, no derivative is
    x = as_input("x", x)
    product = two_sided_limit(lambda at: value_and_hvp(f, at, v, mode=mode)[1], partial(gradient, f), x, product)
    check_finite("hvp's product", product)
    return product


def value_and_hvp(f: ScalarFunction, x: Input, v: Input, *, mode: str) -> tuple[Tensor, Input]:
    """Return f(x), which the product computes anyway, and H v as ``hvp`` does."""
    if mode not in HVP_MODES:
        raise ValueError(f"hvp: mode={mode!r} is not one of {', '.join(HVP_MODES)}.")
    x = as_input("x", x)
    direction = check_direction("v", x, v)
    with explain_unsupported(_MODE_ADVICE[mode]):
        value, product = HVP_MODES[mode](as_scalar_function(f), x, direction)
    return value, product


_MODE_ADVICE = {
    "forward_over_reverse": "hvp's mode='forward_over_reverse' takes tangents through every operation; take "
    "mode='reverse_over_reverse', which does not, but needs its second derivative",
    "reverse_over_forward": "hvp's mode='reverse_over_forward' differentiates the forward-mode formula of every "
    "operation; take mode='reverse_over_reverse', which does not, or 'forward_over_reverse'",
    "reverse_over_reverse": "hvp's mode='reverse_over_reverse' needs the derivative of every operation's derivative, "
    "and this one has no second derivative; write it out of others",
}


def _forward_over_reverse(f: ScalarFunction, x: Any, v: Any) -> tuple[Tensor, Any]:
    checked = check_forward_mode_support(f)

    def gradient_and_value(x: Any) -> tuple[Any, Tensor]:
        value, vjp_fn = vjp(checked, x)
        return vjp_fn(torch.ones_like(value)), value

    _, product, value = jvp(gradient_and_value, x, v, has_aux=True)
    return value, product


def _reverse_over_reverse(f: ScalarFunction, x: Any, v: Any) -> tuple[Tensor, Any]:
    leaves, spec = tree_flatten(x)
    with torch.enable_grad():
        at = [leaf.detach().requires_grad_() for leaf in leaves]
        with CorrectedOperations(SECOND_DERIVATIVE):
            value = f(tree_unflatten(at, spec))
        if not value.requires_grad:
            return value, tree_map(torch.zeros_like, x)
        check_twice_differentiable(value)
        grads = torch.autograd.grad(value, at, create_graph=True, materialize_grads=True)
        curved = [(g, w) for g, w in zip(grads, tree_flatten(v)[0], strict=True) if g.requires_grad]
        if not curved:  # f is linear: its gradient is a constant
            return value.detach(), tree_map(torch.zeros_like, x)
        gs, vs = zip(*curved, strict=True)
        products = torch.autograd.grad(gs, at, vs, materialize_grads=True)
    return value.detach(), tree_unflatten(list(products), spec)


def _reverse_over_forward(f: ScalarFunction, x: Any, v: Any) -> tuple[Tensor, Any]:
    values: list[Tensor] = []
    checked = check_forward_mode_support(f, nested=1)

    def slope(x: Any) -> Tensor:
        value, along = jvp(checked, x, v)
        values.append(value.detach())
        return along

    product = gradient(slope, x)
    return values[0], product


HVP_MODES: dict[str, Callable[[ScalarFunction, Any, Any], tuple[Tensor, Any]]] = {
    "forward_over_reverse": _forward_over_reverse,
    "reverse_over_reverse": _reverse_over_reverse,
    "reverse_over_forward": _reverse_over_forward,
}
"""By value of ``mode``: the order in which the two derivatives are taken."""


def gauss_newton_vp(model: Callable[[Any], Tensor], loss: ScalarFunction, x: Input, v: Input) -> Input:
    """Return the product of the generalised Gauss-Newton matrix of ``loss(model(x))`` with ``v``.

        G v = J^T (d2 loss / dz2) J v,    J = dz/dx,  z = model(x)

    It is the Hessian without the curvature of the model, and positive semi-definite if the loss is convex.
    ``model`` maps ``x`` to predictions of any shape, ``loss`` these to a scalar.

    Returns:
        G v, shaped like ``x``.

    Raises:
        ValueError, TypeError: where ``hvp`` raises them.

    Reference: Schraudolph 2002, "Fast curvature matrix-vector products for second-order gradient descent".
    """
    x = as_input("x", x)

    def corrected(x: Any) -> Tensor:
        with CorrectedOperations():
            return model(x)

    with explain_unsupported(
        "gauss_newton_vp takes J v in forward mode; hvp(..., mode='reverse_over_reverse') of a model and a loss in one "
        "gives the Hessian without it"
    ):
        z, jv = jvp(check_forward_mode_support(corrected), x, check_direction("v", x, v))
    _, vjp_fn = vjp(corrected, x)
    product = vjp_fn(hvp(loss, z, jv, mode="reverse_over_reverse"))
    check_finite("gauss_newton_vp's product", product)
    return product
