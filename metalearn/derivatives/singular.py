"""Compute Hessian-vector products where the formula is 0/0 but the function is smooth, as ``x.norm()**2`` at 0.

H(x) v = lim H(x + h u) v,  h -> 0,    taken where the limits from both sides agree and the gradient is continuous
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

_MAX_SPREAD = 100
"""Largest difference between the limits from both sides, in steps h, relative to H v."""


def two_sided_limit(product: Callable[[Any], Any], gradient: Callable[[Any], Any], x: Any, at_x: Any) -> Any:
    """Return the limit of H v (``product``) at x from both sides, or ``at_x`` if there is none.

    The limit is taken along two random directions without zeros, as v may be zero where the formula is 0/0. It has an
    error of order h^2: 1e-12 in float64, 1e-5 in float32, relative to the third derivatives.
    """
    first, second = (_limit_along(product, gradient, x, seed=seed) for seed in (0, 1))
    if first is None or second is None:
        return at_x
    (mean, allowed), (other, _) = first, second
    return mean if _norm(_difference(mean, other)) <= allowed * _norm(mean) else at_x


def _limit_along(
    product: Callable[[Any], Any], gradient: Callable[[Any], Any], x: Any, *, seed: int
) -> tuple[Any, float] | None:
    """Return the limit along one direction and the relative difference allowed for another, or ``None``."""
    leaves, spec = tree_flatten(x)
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf) for leaf in leaves]
    h = float(torch.finfo(leaves[0].dtype).eps ** 0.4 / _norm(draws))
    points = {s: tree_unflatten([a + s * h * u for a, u in zip(leaves, draws, strict=True)], spec) for s in _SIDES}
    products = {s: product(point) for s, point in points.items()}
    mean = tree_map(lambda a, b: (a + b) / 2, products[-1], products[1])
    allowed = _MAX_SPREAD * h * _norm(draws)
    spread = max(_norm(_difference(p, mean)) for p in products.values())
    gradients = {s: gradient(point) for s, point in points.items()}
    near, far = (_difference(gradients[s], gradients[-s]) for s in (1, 2))  # of a smooth function: as 1 to 2
    curvature_jump = _norm(tree_map(lambda a, b: b - 2 * a, near, far))
    smooth = spread <= allowed * _norm(mean) and curvature_jump <= math.sqrt(allowed) * _norm(near)
    return (mean, allowed) if smooth else None


_SIDES = (-2, -1, 1, 2)


def _difference(a: Any, b: Any) -> Any:
    return tree_map(torch.sub, a, b)


def _norm(tree: Any) -> float:
    return float(torch.nn.utils.get_total_norm(tree_flatten(tree)[0]))
