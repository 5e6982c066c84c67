"""Products with second-derivative matrices that are never formed, at the price of a few gradients:

hvp:               H v = d/dt grad f(x + t v) at t = 0                (Pearlmutter 1994)
gauss_newton_vp:   G v = J^T (d2 loss / dz2) J v,  z = model(x)       (Schraudolph 2002)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from metalearn.core.graph_checks import check_twice_differentiable
from metalearn.core.operations import SECOND_DERIVATIVE, CorrectedOperations
from metalearn.derivatives.inputs import (
    Point,
    ScalarFunction,
    as_input,
    as_scalar_function,
    check_direction,
    check_forward_mode_support,
    jvp,
    refusing_by_name,
    vjp,
)
from metalearn.derivatives.singular import check_finite, is_finite, limit_of_product


def gradient(f: ScalarFunction, x: Point) -> Point:
    """df/dx by reverse mode, without a graph of its own: the activations are freed as the pass comes to them.

    Unlike ``torch.func.grad``, which keeps both so that it can be nested in reverse mode. Forward mode may be put
    around it.

    Raises:
        ValueError: if ``f`` does not give a scalar.
        TypeError: if ``x`` holds other than floating-point tensors.
    """
    value, pull_back = vjp(as_scalar_function(f), as_input("x", x))
    return cast(Point, pull_back(torch.ones_like(value)))


def hvp(f: ScalarFunction, x: Point, v: Point, *, mode: str = "forward_over_reverse") -> Point:
    """Hessian-vector product H v of ``f`` at ``x``, in the memory of a few gradients, whatever the size of H.

        forward_over_reverse:  d/dt grad f(x + t v)           no graph of a gradient: the least memory on deep networks
        reverse_over_reverse:  d/dx <grad f(x), v>            needs no forward-mode formulas
        reverse_over_forward:  d/dx (d/dt f(x + t v))         needs no second derivative of a backward formula

    Args:
        f: from a point to a scalar.
        x: where.
        v: direction, shaped like ``x``.
        mode: one of ``HVP_MODES``.

    Returns:
        H v, shaped like ``x``: a constant, also where something differentiates through this function.

    Raises:
        ValueError: if ``f`` does not give a scalar, ``v`` is not shaped like ``x``, or the mode is unknown.
        TypeError: if ``x`` or ``v`` holds other than floating-point tensors.
        NotImplementedError: in the modes that use forward mode, if an operation lacks a formula for it, or if ``f``
            enters ``torch.no_grad()``, which forward mode does not see.

    Example:
        >>> x, v = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0])
        >>> hvp(lambda x: x[0] ** 2 * x[1], x, v)
        tensor([4., 2.])

    Reference: Pearlmutter 1994, "Fast exact multiplication by the Hessian".
    """
    value, product = value_and_hvp(f, x, v, mode=mode)
    if torch._C._are_functorch_transforms_active() or is_finite(product) or not torch.isfinite(value):
        return product  # inside a transform no value can be looked at; and where f is not finite, nothing is
    x = as_input("x", x)
    product = limit_of_product(lambda at: value_and_hvp(f, at, v, mode=mode)[1], partial(gradient, f), x, product)
    check_finite("hvp's product", product)
    return cast(Point, product)


def value_and_hvp(f: ScalarFunction, x: Point, v: Point, *, mode: str) -> tuple[Tensor, Point]:
    """f(x), which the product computes on its way, and H v; as ``hvp``."""
    if mode not in HVP_MODES:
        raise ValueError(f"hvp: mode={mode!r} is not one of {', '.join(HVP_MODES)}.")
    x = as_input("x", x)
    direction = check_direction("v", x, v)
    with refusing_by_name(_ADVICE[mode]):
        value, product = HVP_MODES[mode](as_scalar_function(f), x, direction)
    return value, cast(Point, product)


_ADVICE = {
    "forward_over_reverse": "hvp's mode='forward_over_reverse' takes tangents through every operation; take "
    "mode='reverse_over_reverse', which does not, but needs its second derivative",
    "reverse_over_forward": "hvp's mode='reverse_over_forward' differentiates the forward-mode formula of every "
    "operation; take mode='reverse_over_reverse', which does not, or 'forward_over_reverse'",
    "reverse_over_reverse": "hvp's mode='reverse_over_reverse' needs the derivative of every operation's derivative, "
    "and this one has no second derivative; write it out of others",
}


def _forward_over_reverse(f: ScalarFunction, x: Any, v: Any) -> tuple[Tensor, Any]:
    watched = check_forward_mode_support(f)

    def gradient_and_value(x: Any) -> tuple[Any, Tensor]:
        value, pull_back = vjp(watched, x)
        return pull_back(torch.ones_like(value)), value

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
    watched = check_forward_mode_support(f, nested=1)

    def slope(x: Any) -> Tensor:
        value, along = jvp(watched, x, v)
        values.append(value.detach())
        return cast(Tensor, along)

    product = gradient(slope, x)
    return values[0], product


HVP_MODES: dict[str, Callable[[ScalarFunction, Any, Any], tuple[Tensor, Any]]] = {
    "forward_over_reverse": _forward_over_reverse,
    "reverse_over_reverse": _reverse_over_reverse,
    "reverse_over_forward": _reverse_over_forward,
}
"""Names for ``mode``: the order in which the two derivatives are taken."""


def gauss_newton_vp(model: Callable[[Any], Tensor], loss: ScalarFunction, x: Point, v: Point) -> Point:
    """Product of the generalised Gauss-Newton matrix of ``loss(model(x))`` with ``v``.

        G v = J^T (d2 loss / dz2) J v,    J = dz/dx,  z = model(x)

    It is the Hessian without the curvature of the model itself, and positive semi-definite where the loss is convex.

    Args:
        model: from a point to predictions z of any shape.
        loss: from predictions to a scalar.
        x: where.
        v: direction, shaped like ``x``.

    Returns:
        G v, shaped like ``x``.

    Raises:
        ValueError, TypeError: as ``hvp``.

    Reference: Schraudolph 2002, "Fast curvature matrix-vector products for second-order gradient descent".
    """
    x = as_input("x", x)

    def corrected(x: Any) -> Tensor:
        with CorrectedOperations():
            return model(x)

    with refusing_by_name(
        "gauss_newton_vp takes J v in forward mode; hvp(..., mode='reverse_over_reverse') of a model and a loss in one "
        "gives the Hessian without it"
    ):
        z, jv = jvp(check_forward_mode_support(corrected), x, check_direction("v", x, v))
    _, pull_back = vjp(corrected, x)
    product = pull_back(hvp(loss, z, jv, mode="reverse_over_reverse"))
    check_finite("gauss_newton_vp's product", product)
    return cast(Point, product)
