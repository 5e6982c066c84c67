"""Hessian-vector products where a formula is 0/0 though the function is smooth, as |x|^2 by ``x.norm()**2`` at 0.

H(x) v = lim H(x + h v) v,  h -> 0,    taken where the limits from both sides agree and the gradient is continuous
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from metalearn.errors import NonFiniteGradientError

_AGREE = 100
"""How many steps h, relative to H v, the limits from both sides may differ by."""


def is_finite(tree: Any) -> bool:
    """Return whether no entry of a tensor or a dictionary is NaN or infinite; one reduction, read once."""
    largest = torch.nn.utils.get_total_norm(tree_flatten(tree)[0], float("inf"))
    return bool(torch.isfinite(largest))


def check_finite_product(function: str, product: Any) -> None:
    """Refuse a product that is not finite.

    Raises:
        NonFiniteGradientError: naming the entry.
    """
    if is_finite(product):
        return
    for name, part in product.items() if isinstance(product, dict) else (("x", product),):
        if (bad := part[~torch.isfinite(part)]).numel():
            raise NonFiniteGradientError(name, value=bad[0].item(), what=f"{function}'s product")


def limit_of_product(product: Callable[[Any], Any], gradient: Callable[[Any], Any], x: Any, v: Any, at_x: Any) -> Any:
    """Return the limit of H v from both sides along v, or ``at_x`` where there is none.

    Args:
        product: from a point to H v there.
        gradient: from a point to the gradient.
        x: where the product is not finite.
        v: direction.
        at_x: the product at x.

    Returns:
        A product that is off by an order of h^2: 1e-12 in float64, 1e-5 in float32, relative to the third derivatives.
    """
    leaves = tree_flatten(x)[0]
    h = torch.finfo(leaves[0].dtype).eps ** 0.4 / max(float(_length(v)), torch.finfo(leaves[0].dtype).tiny)
    points = {s: tree_map(lambda a, b, s=s: a + s * h * b, x, v) for s in (-2, -1, 1, 2)}
    products = {s: product(point) for s, point in points.items()}
    mean = tree_map(lambda a, b: (a + b) / 2, products[-1], products[1])
    allowed = _AGREE * h * float(_length(v)) * float(_length(mean))
    spread = max(float(_length(_minus(p, mean))) for p in products.values())
    slope = tree_map(lambda a, b: (a - b) / (2 * h), gradient(points[1]), gradient(points[-1]))
    continuous = float(_length(_minus(slope, mean))) <= allowed
    return mean if spread <= allowed and continuous else at_x


def _minus(a: Any, b: Any) -> Any:
    return tree_map(torch.sub, a, b)


def _length(tree: Any) -> Tensor:
    length: Tensor = torch.nn.utils.get_total_norm(tree_flatten(tree)[0])
    return length
