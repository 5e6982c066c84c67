"""Hessian-vector products where a formula is 0/0 though the function is smooth, as |x|^2 by ``x.norm()**2`` at 0.

H(x) v = lim H(x + h u) v,  h -> 0,    taken where the limits from both sides agree and the gradient is continuous
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from metalearn.core.errors import NonFiniteGradientError

_AGREE = 100
"""How many steps h, relative to H v, the limits from both sides may differ by."""


def is_finite(tree: Any) -> bool:
    """Return whether no entry of a tensor or a dictionary is NaN or infinite; one reduction, read once."""
    leaves = [leaf for leaf in tree_flatten(tree)[0] if leaf.numel()]
    return bool(torch.isfinite(torch.nn.utils.get_total_norm(leaves, float("inf"))))


def check_finite(what: str, derivative: Any) -> None:
    """Refuse a derivative that is not finite.

    Args:
        what: it is, for the message.
        derivative: a tensor, or by name tensors or dictionaries of them.

    Raises:
        NonFiniteGradientError: naming the entry.
    """
    if not is_finite(derivative) and (found := first_nonfinite(derivative)):
        raise NonFiniteGradientError(found[0], value=found[1], what=what)


def first_nonfinite(derivative: Any) -> tuple[str, float] | None:
    """Return the name and the value of the first entry that is NaN or infinite; a tensor alone is called ``x``."""
    for name, part in derivative.items() if isinstance(derivative, dict) else (("x", derivative),):
        for leaf in tree_flatten(part)[0]:
            if (bad := leaf[~torch.isfinite(leaf)]).numel():
                return name, bad[0].item()
    return None


def limit_of_product(product: Callable[[Any], Any], gradient: Callable[[Any], Any], x: Any, at_x: Any) -> Any:
    """Return the limit of H v as x is come to from both sides, or ``at_x`` where there is none.

    It is come to along two directions that have no zeros, as v may have them where the formula is 0/0.

    Args:
        product: from a point to H v there.
        gradient: from a point to the gradient.
        x: where the product is not finite.
        at_x: the product at x.

    Returns:
        A product that is off by an order of h^2: 1e-12 in float64, 1e-5 in float32, relative to the third derivatives.
    """
    first, second = (_limit_along(product, gradient, x, seed=seed) for seed in (0, 1))
    if first is None or second is None:
        return at_x
    (mean, allowed), (other, _) = first, second
    return mean if _length(_minus(mean, other)) <= allowed * _length(mean) else at_x


def _limit_along(
    product: Callable[[Any], Any], gradient: Callable[[Any], Any], x: Any, *, seed: int
) -> tuple[Any, float] | None:
    """Return the limit along one direction, and by how much of itself another may differ; or ``None``."""
    leaves, spec = tree_flatten(x)
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf) for leaf in leaves]
    h = float(torch.finfo(leaves[0].dtype).eps ** 0.4 / _length(draws))
    points = {s: tree_unflatten([a + s * h * u for a, u in zip(leaves, draws, strict=True)], spec) for s in _SIDES}
    products = {s: product(point) for s, point in points.items()}
    mean = tree_map(lambda a, b: (a + b) / 2, products[-1], products[1])
    allowed = _AGREE * h * _length(draws)
    spread = max(_length(_minus(p, mean)) for p in products.values())
    gradients = {s: gradient(point) for s, point in points.items()}
    near, far = (_minus(gradients[s], gradients[-s]) for s in (1, 2))  # of a smooth function: as 1 to 2
    bend = _length(tree_map(lambda a, b: b - 2 * a, near, far))
    smooth = spread <= allowed * _length(mean) and bend <= math.sqrt(allowed) * _length(near)
    return (mean, allowed) if smooth else None


_SIDES = (-2, -1, 1, 2)


def _minus(a: Any, b: Any) -> Any:
    return tree_map(torch.sub, a, b)


def _length(tree: Any) -> float:
    return float(torch.nn.utils.get_total_norm(tree_flatten(tree)[0]))
