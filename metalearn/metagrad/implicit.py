"""iMAML: the meta-gradient where the inner problem is solved, whatever way led there; memory does not grow with K.

    phi = argmin L_support(phi) + rho/2 |phi - theta|^2                                               (section 3)
    d L_query(phi) / d theta = (I + H/rho)^{-1} dL_query(phi),    H = d2 L_support(phi)               (lemma 1)

with rho = ``inner.proximal``, the paper's lambda (``lam`` is an adjoint here). The system is solved by conjugate
gradients, which need nothing of H but products with it. (Rajeswaran et al. 2019, arXiv 1909.04630, algorithm 2.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from metalearn.core.types import Episodes, Forward, Loss, MetaGradient, Params
from metalearn.inner import (
    InnerLoop,
    adapted_param_names,
    init_state,
    inner_step,
    params_at_step,
    total_support_loss,
    without_state,
)
from metalearn.inner.update_rules import broadcast_over_params
from metalearn.metagrad.adjoint import support_hvp
from metalearn.metagrad.common import ForwardPass, refuse_without_gradient
from metalearn.metagrad.trajectory import Snapshot, rollout


@dataclass(frozen=True)
class Implicit:
    """An engine that takes the implicit gradient at theta_K, after K steps under ``inner.proximal``.

    It is exact as far as theta_K solves the inner problem, for which gradient descent needs ``inner.lr`` below
    2 / (rho + the largest curvature) and steps enough, and as far as the system is solved: the result's ``diagnostics``
    has ``cg_residual``, the mean over tasks of |b - A x| / |b|, and ``cg_residual_max``, the largest (of a batch in
    chunks, the mean of the chunks' largest), with A = (1 + damping + weight_decay / rho) I + H/rho.

    Args:
        cg_steps: iterations of conjugate gradients, each one Hessian-vector product for all tasks; at least 1.
        cg_tolerance: a task stops where its residual |b - A x| / |b| is no larger; at least 0.
        damping: added to A's diagonal, at least 0; the gradient is then no longer exact.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> inner = InnerLoop(lr=0.1, steps=16, proximal=2.0)
        >>> result = Implicit(cg_steps=5)(forward, theta, episodes, inner, cross_entropy)
        >>> result.diagnostics["cg_residual"]
    """

    cg_steps: int = 5
    cg_tolerance: float = 1e-10
    damping: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.cg_steps, int) or self.cg_steps < 1:
            raise ValueError(f"Implicit: cg_steps={self.cg_steps!r}; it must be a whole number, 1 or more.")
        for name in ("cg_tolerance", "damping"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"Implicit: {name}={getattr(self, name)!r}; it must be a number, 0 or more.")

    def __call__(
        self, forward: Forward, params: Params, episodes: Episodes, inner: InnerLoop, loss: Loss
    ) -> MetaGradient:
        """The meta-gradient of one chunk of tasks; arguments and result as in ``metalearn.meta_gradient``.

        Of what is not adapted (``inner.adapted``) the gradient goes through the solution too, dL_query - H x / rho with
        H's rows of these parameters. ``second_order=False`` drops H.

        Raises:
            ValueError: if ``inner.proximal`` is 0, or if ``inner`` has a setting that iMAML has no gradient for:
                ``learned_lr``, ``query_weights`` or ``per_step``.
            NonFiniteLossError: if a loss is NaN or infinite.
        """
        _refuse_settings(inner)
        phi, way = _solve_inner_problem(forward, params, episodes, inner, loss)
        hessian = _hessian(forward, phi, episodes, inner, loss)
        rho = inner.proximal

        def system(v: Params) -> Params:
            curved = hessian(v)
            return {n: (1 + self.damping + inner.weight_decay / rho) * w + curved[n] / rho for n, w in v.items()}

        b = {name: way.lam[name] for name in adapted_param_names(phi, inner)}
        x, residuals = conjugate_gradients(system, b, steps=self.cg_steps, tolerance=self.cg_tolerance)
        constants = [name for name in without_state(phi) if name not in x]
        curved = hessian(x) if constants else {}
        lam = {**way.lam, **x, **{name: way.lam[name] - curved[name] / rho for name in constants}}
        diagnostics = {"cg_residual": residuals.mean(), "cg_residual_max": residuals.max()}
        return dataclasses.replace(way.outcome(lam), diagnostics=diagnostics)


def _solve_inner_problem(
    forward: Forward, params: Params, episodes: Episodes, inner: InnerLoop, loss: Loss
) -> tuple[Params, ForwardPass]:
    """What is carried out of K steps, phi and what rules remember, and the query pass there; no step is kept."""

    def step(k: int, carry: Params) -> tuple[Params, Tensor]:
        return inner_step(forward, carry, episodes.support_x, episodes.support_y, inner, loss=loss, k=k)

    theta = {name: p.detach() for name, p in params.items()}
    with torch.no_grad():
        carry = init_state(forward, theta, episodes.support_x, episodes.support_y, inner)
    phi, trajectory = rollout(step, carry, steps=inner.steps, every=None)
    way = ForwardPass(forward, params, episodes, inner, loss, trajectory)
    way.arrive(phi)
    return phi, way


def _hessian(
    forward: Forward, phi: Params, episodes: Episodes, inner: InnerLoop, loss: Loss
) -> Callable[[Params], Params]:
    """Products H v at phi, a block for every task; v has entries of the adapted parameters, H v of all the model's.

    Dropout draws the same mask for all of them, so that H is one matrix. In first order H is 0.
    """
    here = Snapshot.of(inner.steps, phi)
    zero = {name: torch.zeros_like(w) for name, w in params_at_step(phi, inner, inner.steps).items()}

    def support_loss(fast: Params) -> Tensor:
        return total_support_loss(forward, fast, episodes.support_x, episodes.support_y, loss=loss)

    def product(v: Params) -> Params:
        return support_hvp(forward, support_loss, here, {**zero, **v})[1] if inner.second_order else zero

    return product


def conjugate_gradients(
    product: Callable[[Params], Params], b: Params, *, steps: int, tolerance: float
) -> tuple[Params, Tensor]:
    """Solve A_t x_t = b_t of T tasks at once, each with its own step lengths.

        alpha = r.r / d.Ad,  x += alpha d,  r -= alpha Ad,  beta = r'.r' / r.r,  d = r' + beta d;  from x = 0, r = d = b

    Where A is not positive definite the minimum that this descends to is none. A task stops where it is when it meets a
    direction with d.Ad <= 0, as Steihaug does (1983); if that is the first one, it takes x = b, the first-order
    gradient (Nocedal & Wright 2006, algorithm 7.1). NaN passes on to x.

    Args:
        product: A v of all tasks, for v named and shaped like ``b``; A is symmetric and has a block for every task.
        b: right-hand sides, each ``[T, ...]``.
        steps: largest number of iterations, one product each; n of them solve n equations, but for rounding.
        tolerance: a task stops where |b - A x| / |b| is no larger.

    Returns:
        ``(x, residuals)``: the iterates, and |b - A x| / |b| of each task, ``[T]``; 0 where b is 0, and so is x.

    Reference: Hestenes & Stiefel 1952, "Methods of conjugate gradients for solving linear systems".
    """
    x, r, d = {name: torch.zeros_like(w) for name, w in b.items()}, b, b
    square = size = _dots(b, b)
    going = size != 0
    for iteration in range(steps):
        if not going.any():
            break
        ad = product(d)
        curvature = _dots(d, ad)
        convex = going & ~(curvature <= 0)
        alpha = torch.where(convex, square / torch.where(convex, curvature, 1.0), 0.0)
        if iteration == 0:
            alpha = torch.where(going & ~convex, 1.0, alpha)
        x, r = _plus(x, alpha, d), _plus(r, -alpha, ad)
        before, square = square, _dots(r, r)
        going = convex & (square > tolerance**2 * size)
        d = _plus(r, torch.where(going, square / torch.where(going, before, 1.0), 0.0), d)
    return x, (square / torch.where(size != 0, size, 1.0)).sqrt()


def _dots(a: Params, b: Params) -> Tensor:
    """Inner products over all of a task's parameters, ``[T]``."""
    return torch.stack([(w * b[name]).reshape(len(w), -1).sum(dim=1) for name, w in a.items()]).sum(dim=0)


def _plus(a: Params, factor: Tensor, b: Params) -> Params:
    """The sum a + factor b, with a factor for every task, ``[T]``."""
    return {name: w + broadcast_over_params(factor, w) * b[name] for name, w in a.items()}


def _refuse_settings(inner: InnerLoop) -> None:
    if not inner.proximal:
        raise ValueError(
            "implicit: inner.proximal is 0, and iMAML's inner problem is L_support(phi) + proximal/2 |phi - theta|^2: "
            "without the second term its solution does not depend on theta. Give inner.proximal a positive number; the "
            "paper takes 2.0."
        )
    reasons = {
        "learned_lr": "the solution of the inner problem does not depend on step sizes",
        "query_weights": "the query loss is taken at the solution, whatever steps led there",
        "per_step": "the inner problem has one solution, and not one for every step",
    }
    refuse_without_gradient("implicit", "iMAML", inner, reasons)
