"""Check directional derivatives against central differences over a sweep of step sizes.

    <grad f(x), v>   against   (f(x + h v) - f(x - h v)) / 2h

The difference has an error of order h^2 from the function's third derivative and of order eps/h from rounding, so one
step size proves nothing: too large and too small are both wrong. The sweep shows the V between them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from metalearn.derivatives import Input, gradient
from metalearn.derivatives.inputs import check_direction

DEFAULT_STEP_SIZES = tuple(10.0**-e for e in range(1, 11))
"""Step sizes of the sweep, in units of a direction of length one."""


@dataclass(frozen=True)
class DirectionalCheck:
    """A directional derivative <gradient, v> and its central differences (``estimates``) at each of ``steps``.

    ``scale``, the denominator of relative errors, is the larger of |analytic| and the gradient's root mean square, as
    the slope along a direction may happen to be tiny.
    """

    analytic: float
    steps: tuple[float, ...]
    estimates: tuple[float, ...]
    scale: float

    @property
    def errors(self) -> tuple[float, ...]:
        """Relative error at each h; infinite where the difference is NaN."""
        errors = (abs(estimate - self.analytic) / self.scale for estimate in self.estimates)
        return tuple(math.inf if math.isnan(error) else error for error in errors)

    @property
    def error(self) -> float:
        """Smallest error that two neighbouring step sizes both reach; a wrong gradient may pass one step by chance."""
        return min(max(pair) for pair in pairwise(self.errors))


def directional(
    f: Callable[[Any], Tensor],
    x: Input,
    v: Input | None = None,
    *,
    gradient_at_x: Input | None = None,
    steps: Sequence[float] = DEFAULT_STEP_SIZES,
    seed: int = 0,
) -> DirectionalCheck:
    """Compare a gradient with central differences along one direction.

    Args:
        f: maps a Tensor or a dictionary of Tensors to a scalar; use float64.
        x: where to differentiate.
        v: direction, shaped like ``x``, scaled to length one; ``None`` draws a random one.
        gradient_at_x: the gradient to check; ``None`` takes ``derivatives.gradient(f, x)``.
        steps: at least two step sizes.
        seed: of the random direction.

    Raises:
        ValueError: for fewer than two steps, for steps that are not positive, for a direction of length zero, or if it
            or the gradient is not shaped like ``x``.

    Examples:
        >>> check = directional(lambda x: x.pow(3).sum(), torch.ones(3, dtype=torch.float64))
        >>> check.error < 1e-8
        True
    """
    if len(steps) < 2 or min(steps) <= 0:
        raise ValueError(f"directional: steps={tuple(steps)}; give at least two positive step sizes.")
    steps = tuple(sorted(steps, reverse=True))
    unit = _unit_direction(x, v, seed)
    grad = gradient(f, x) if gradient_at_x is None else check_direction("gradient_at_x", x, gradient_at_x)
    analytic = _dot(grad, unit)
    size = sum(t.numel() for t in tree_flatten(x)[0])

    def value_at(h: float) -> float:
        with torch.no_grad():
            return float(f(tree_map(lambda t, u: t + h * u, x, unit)))

    return DirectionalCheck(
        analytic=analytic,
        steps=steps,
        estimates=tuple((value_at(h) - value_at(-h)) / (2 * h) for h in steps),
        scale=max(abs(analytic), (_dot(grad, grad) / size) ** 0.5, torch.finfo(torch.float64).tiny),
    )


def _unit_direction(x: Input, v: Input | None, seed: int) -> Any:
    """Return v, or a random direction, scaled to length one."""
    if v is None:
        generator = torch.Generator().manual_seed(seed)
        v = tree_map(lambda t: torch.randn(t.shape, generator=generator, dtype=t.dtype).to(t.device), x)
    v = check_direction("v", x, v)
    length = _dot(v, v) ** 0.5
    if not length > 0:
        raise ValueError("directional: the direction v has length zero; give one that leads somewhere.")
    return tree_map(lambda t: t / length, v)


def _dot(a: Any, b: Any) -> float:
    pairs = zip(tree_flatten(a)[0], tree_flatten(b)[0], strict=True)
    return sum(float((x.double() * y.double()).sum()) for x, y in pairs)
