"""Newton's method by products with the Hessian: conjugate gradients solve H p = -g without the matrix.

    z <- z + a d,   r <- r + a H d,   d <- -r + b d     until |r| <= min(1/2, sqrt|g|) |g|,  or d' H d <= 0

This is the line-search Newton-CG of Nocedal & Wright 2006, "Numerical optimization", algorithm 7.1. That stopping rule
makes the last steps superlinear (theorem 7.2), of order 3/2.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from matplotlib.figure import Figure
from torch import Tensor

from metalearn.derivatives import ScalarFunction, gradient, hessian, hvp
from metalearn.lessons.lesson import BLUE, VERMILION, Check, Lesson, panels, source_of, yes_or_no

N = 10
_PRODUCT_COST = 3  # gradients, rounded up from what the lesson on hvp measures
_VALUE_COST = 1  # a value alone takes about a third of a gradient; counted in full, against Newton
_TOLERANCE = 1e-9
_MAX_STEPS = 200
_STEP_SIZES = tuple(1e-4 * 2 ** (i / 2) for i in range(11))  # 1e-4 to 3e-3; 2 / lambda_max at the minimum is 1.1e-3

_CLAIM = f"""\
Newton's method is said to be infeasible because it needs the Hessian and its inverse. It needs neither: conjugate \
gradients solve H p = -g by products with H, and stop early while the gradient is long, where a precise direction \
would be wasted. Where the curvature along a direction is negative, the solver stops before it, so that p is a \
descent direction even where H is not positive definite.

Here it minimises Rosenbrock's function in {N} variables, from the origin, to (1, ..., 1). The last steps are \
superlinear: every gradient is a smaller fraction of the one before. Gradient descent gets the best of \
{len(_STEP_SIZES)} step sizes and the same budget, counted in gradients (a product as {_PRODUCT_COST}, a value in the \
line search as {_VALUE_COST}); the curvatures differ by a factor of 3,500, and the largest one limits the step."""


@dataclass(frozen=True)
class Iterate:
    """A point, the length of its gradient, and the cost so far, in gradients."""

    x: Tensor
    norm: float
    cost: int

    @property
    def distance(self) -> float:
        """Distance from the minimum."""
        return float((self.x - 1).norm())


def rosenbrock(x: Tensor) -> Tensor:
    """Compute sum_i 100 (x_{i+1} - x_i^2)^2 + (1 - x_i)^2, a curved valley with minimum 0 at (1, ..., 1)."""
    return (100 * (x[1:] - x[:-1].square()).square() + (1 - x[:-1]).square()).sum()


def newton_direction(product: Callable[[Tensor], Tensor], grad: Tensor) -> tuple[Tensor, int]:
    """Solve H p = -grad to a useful accuracy; return p and the number of products."""
    enough = min(0.5, grad.norm().item() ** 0.5) * grad.norm()
    z, r, d = torch.zeros_like(grad), grad, -grad
    for products in range(1, 2 * grad.numel() + 1):
        hd = product(d)
        curvature = d.dot(hd)
        if curvature <= 0:
            return (-grad if products == 1 else z), products
        a = r.dot(r) / curvature
        z, residual = z + a * d, r + a * hd
        if residual.norm() <= enough:
            break
        d = residual.dot(residual) / r.dot(r) * d - residual
        r = residual
    return z, products


def backtrack(f: ScalarFunction, x: Tensor, p: Tensor, grad: Tensor) -> tuple[float, int]:
    """Halve the step, from 1, until f falls by enough (Armijo); return the step and the number of values."""
    start, slope, step = f(x), grad.dot(p), 1.0
    for values in range(2, 40):
        # Near the minimum f decreases by less than its rounding error: hence the last term.
        if f(x + step * p) <= start + 1e-4 * step * slope + 1e-15:
            return step, values
        step /= 2
    return step, values


def newton_cg(f: ScalarFunction, x: Tensor) -> list[Iterate]:
    """Run Newton-CG until the gradient is shorter than 1e-9."""
    grad = gradient(f, x)
    path = [Iterate(x, grad.norm().item(), cost=1)]
    while path[-1].norm >= _TOLERANCE and len(path) <= _MAX_STEPS:
        p, products = newton_direction(lambda v, x=x: hvp(f, x, v), grad)  # type: ignore[misc]
        step, values = backtrack(f, x, p, grad)
        x = x + step * p
        grad = gradient(f, x)
        cost = path[-1].cost + products * _PRODUCT_COST + values * _VALUE_COST + 1
        path.append(Iterate(x, grad.norm().item(), cost))
    return path


def descent(f: ScalarFunction, x: Tensor, lr: float, budget: int) -> list[Iterate]:
    """Run gradient descent for a number of gradients, or until it diverges."""
    path: list[Iterate] = []
    for cost in range(1, budget + 1):
        grad = gradient(f, x)
        path.append(Iterate(x, grad.norm().item(), cost))
        if not path[-1].norm < 1e9:
            break
        x = x - lr * grad
    return path


def lesson() -> Lesson:
    """Run the lesson."""
    origin = torch.zeros(N, dtype=torch.float64)
    began = time.perf_counter()
    newton = newton_cg(rosenbrock, origin)
    seconds = time.perf_counter() - began
    lr = best_step(origin, newton[-1].cost)
    plain = descent(rosenbrock, origin, lr, 10 * newton[-1].cost)
    return Lesson(
        title="Newton's method without the Hessian",
        claim=_CLAIM,
        code=source_of(rosenbrock, newton_direction, backtrack, newton_cg),
        checks=_checks(newton, plain),
        notes=[*_notes(newton, plain, lr), f"{seconds:.2f} s for Newton-CG"],
        plots={"newton": _plot(newton, plain, lr)},
    )


def best_step(start: Tensor, budget: int) -> float:
    """Return the step size with which gradient descent reaches the lowest value."""

    def lowest(lr: float) -> float:
        return rosenbrock(descent(rosenbrock, start, lr, budget)[-1].x).nan_to_num(torch.inf).item()

    return min(_STEP_SIZES, key=lowest)


def ratios(path: list[Iterate]) -> list[float]:
    """Divide the length of each gradient by that of the one before."""
    return [after.norm / before.norm for before, after in pairwise(path)]


def _checks(newton: list[Iterate], plain: list[Iterate]) -> list[Check]:
    last, theorem = ratios(newton)[-3:], "Nocedal & Wright 2006, theorem 7.2"
    falls, small = yes_or_no(last[0] > last[1] > last[2]), yes_or_no(max(last[1:]) < 0.1)
    near = yes_or_no(plain[newton[-1].cost - 1].distance < 0.1)
    return [
        Check("Newton-CG: distance from (1, ..., 1)", newton[-1].distance, 0.0, 1e-8),
        Check("Newton-CG: value of f", rosenbrock(newton[-1].x).item(), 0.0, 1e-15),
        Check("Newton-CG: |g_k+1| / |g_k| falls in each of the last three steps", falls, "yes", source=theorem),
        Check("Newton-CG: the last two of these are below 0.1", small, "yes", source="the same"),
        Check("gradient descent, same budget: within 0.1 of (1, ..., 1)", near, "no", source="measured"),
    ]


def _notes(newton: list[Iterate], plain: list[Iterate], lr: float) -> list[str]:
    minimum = torch.ones(N, dtype=torch.float64)
    curvatures = torch.linalg.eigvalsh(hessian(rosenbrock, minimum))
    same, ten = plain[newton[-1].cost - 1], plain[-1]
    return [
        f"Newton-CG: {len(newton) - 1} steps, {newton[-1].cost} gradients, |g| = {newton[-1].norm:.1e}, "
        f"distance {newton[-1].distance:.1e}",
        f"gradient descent, step {lr:.1e}, same budget: |g| = {same.norm:.2g}, distance {same.distance:.2g}",
        f"gradient descent, {ten.cost:,} gradients: |g| = {ten.norm:.2g}, distance {ten.distance:.2g}",
        f"curvatures at the minimum: {curvatures[0]:.2g} to {curvatures[-1]:.0f}; |g_k+1| / |g_k| of Newton-CG at the "
        f"end: {', '.join(f'{r:.1e}' for r in ratios(newton)[-5:])}",
    ]


def _plot(newton: list[Iterate], plain: list[Iterate], lr: float) -> Figure:
    figure, (steps, costs) = panels(2, width=10, height=4)
    by_descent = f"gradient descent, step {lr:.1e}"
    for path, colour, style, name in ((newton, BLUE, "o-", "Newton-CG"), (plain, VERMILION, "-", by_descent)):
        norms = [max(i.norm, 1e-13) for i in path]  # an exact 0 has no logarithm
        steps.semilogy(range(len(path)), norms, style, color=colour, markersize=3, label=name)
        costs.loglog([i.cost for i in path], norms, style, color=colour, markersize=3, label=name)
    steps.set(xlabel="iteration", ylabel="length of the gradient", title="by iterations", xlim=(-2, 1.5 * len(newton)))
    costs.set(xlabel="cost [gradients]", ylabel="length of the gradient", title="by cost")
    costs.legend(frameon=False, loc="lower left")
    return figure
