"""iMAML: the meta-gradient at the solution of the inner problem; memory does not grow with K.

    phi = argmin L_support(phi) + rho/2 |phi - theta|^2                                               (section 3)
    d L_query(phi) / d theta = (I + H/rho)^{-1} dL_query(phi),    H = d2 L_support(phi)               (lemma 1)

with rho = ``inner.proximal_weight``, the paper's lambda (``lam`` is an adjoint here). The system is solved by conjugate
gradients, which need only products with H. (Rajeswaran et al. 2019, arXiv 1909.04630, algorithm 2.)
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
    InnerState,
    adapted_param_names,
    params_at_step,
    split_meta,
    taken_by,
    total_support_loss,
    without_state,
)
from metalearn.inner.update_rules import broadcast_over_params
from metalearn.metagrad.adjoint import support_hvp
from metalearn.metagrad.common import ForwardPass, check_unsupported_settings, take_inner_steps
from metalearn.metagrad.trajectory import StepCheckpoint

_UNSUPPORTED = {
    "learned_lr": "the solution of the inner problem does not depend on step sizes",
    "decoupled_weight_decay": "the rule may scale the steps, so that they end where no known function is least",
    "transform": "the solution of the inner problem does not depend on a preconditioner of the steps",
    "query_weights": "the query loss is taken at the solution, whatever steps led there",
    "per_step_params": "the inner problem has one solution, and not one for every step",
}


@dataclass(frozen=True)
class Implicit:
    """Engine for the implicit gradient at theta_K, after K steps under ``inner.proximal_weight``.

    It is exact if theta_K solves the inner problem, for which gradient descent needs enough steps and ``inner.lr``
    below 2 / (rho + the largest curvature), and if the linear system is solved. The result's ``diagnostics`` has
    ``cg_residual``, the mean over tasks of |b - A x| / |b|, and ``cg_residual_max``, the largest, with
    A = (1 + damping + weight_decay / rho) I + H/rho.

    Args:
        cg_steps: iterations of conjugate gradients, each one Hessian-vector product for all tasks; at least 1.
        cg_tolerance: a task stops where its residual |b - A x| / |b| is no larger; at least 0.
        damping: added to A's diagonal, at least 0; the gradient is then no longer exact.

    Raises:
        ValueError: if a number is out of range.

    Examples:
        >>> inner = InnerLoop(lr=0.1, steps=16, proximal_weight=2.0)
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
        """Compute the meta-gradient of one chunk of tasks, as ``metalearn.meta_gradient`` does.

        The gradient of parameters outside ``inner.adapted_params`` goes through the solution too: dL_query - H x / rho
        with H's rows of these parameters. ``second_order=False`` drops H.

        Raises:
            ValueError: if ``inner.proximal_weight`` is 0, or if ``inner`` has a setting that iMAML has no gradient for:
                ``learned_lr``, ``transform``, ``decoupled_weight_decay``, ``query_weights`` or ``per_step_params``;
                or a meta-learned tensor that the rule alone takes.
            NonFiniteLossError: if a loss is NaN or infinite.
        """
        if not inner.proximal_weight:
            raise ValueError(
                "implicit: inner.proximal_weight is 0, and iMAML's inner problem is L_support(phi) + proximal_weight/2 "
                "|phi - theta|^2: without the second term its solution does not depend on theta. Give "
                "inner.proximal_weight a positive number; the paper takes 2.0."
            )
        check_unsupported_settings("implicit", "iMAML", inner, _UNSUPPORTED)
        meta = split_meta(params)[1]
        if only := taken_by(inner.rule.update, meta).keys() - {*taken_by(forward, meta), *taken_by(loss, meta)}:
            raise ValueError(
                f"implicit: the rule takes {sorted(only)}, and the solution of the inner problem does not depend on "
                "the steps to it; iMAML has no gradient there."
            )
        rho = inner.proximal_weight
        # Solve the inner problem: phi = theta_K
        phi, trajectory = take_inner_steps(forward, params, episodes, inner, loss, checkpoint_every=None)
        forward_pass = ForwardPass(forward, params, episodes, inner, loss, trajectory, phi)
        # Solve (I + H/rho) x = dL_query(phi)
        hessian = _hessian(forward, phi, episodes, inner, loss)

        def system(v: Params) -> Params:
            hv = hessian(v)
            return {n: (1 + self.damping + inner.weight_decay / rho) * w + hv[n] / rho for n, w in v.items()}

        b = {name: forward_pass.lam[name] for name in adapted_param_names(phi, inner)}
        x, residuals = conjugate_gradients(system, b, steps=self.cg_steps, tolerance=self.cg_tolerance)
        # The gradient of parameters that are not adapted
        constants = [name for name in without_state(phi) if name not in x]
        hx = hessian(x) if constants else {}
        lam = {**forward_pass.lam, **x, **{name: forward_pass.lam[name] - hx[name] / rho for name in constants}}
        diagnostics = {"cg_residual": residuals.mean(), "cg_residual_max": residuals.max()}
        return dataclasses.replace(forward_pass.result(lam), diagnostics=diagnostics)


def _hessian(
    forward: Forward, phi: InnerState, episodes: Episodes, inner: InnerLoop, loss: Loss
) -> Callable[[Params], Params]:
    """Return the function v -> H v at phi: from the adapted parameters to all; in first order H is 0.

    Dropout draws the same mask for all products, so that H is one matrix.
    """
    checkpoint = StepCheckpoint.of(inner.steps, phi)
    zero = {name: torch.zeros_like(w) for name, w in params_at_step(phi, inner, inner.steps).items()}

    def support_loss(fast: Params) -> Tensor:
        return total_support_loss(forward, fast, episodes.support_x, episodes.support_y, loss=loss)

    def product(v: Params) -> Params:
        return support_hvp(forward, support_loss, checkpoint, {**zero, **v})[1] if inner.second_order else zero

    return product


def conjugate_gradients(
    product: Callable[[Params], Params], b: Params, *, steps: int, tolerance: float
) -> tuple[Params, Tensor]:
    """Solve A_t x_t = b_t of T tasks at once, each with its own step lengths.

        alpha = r.r / d.Ad,  x += alpha d,  r -= alpha Ad,  beta = r'.r' / r.r,  d = r' + beta d;  from x = 0, r = d = b

    If A is not positive definite, a task stops at the first direction with d.Ad <= 0 (Steihaug 1983); if that is the
    very first one, with x = b, the first-order gradient (Nocedal & Wright 2006, algorithm 7.1). NaN passes on to x.

    ``product`` is v -> A v of all tasks, for v named and shaped like ``b``, each ``[T, ...]``. A task stops after
    ``steps`` products, or where |b - A x| / |b| is no larger than ``tolerance``. No product follows when all have
    stopped; on a GPU, where finding that out would take a wait, there are always ``steps``.

    Returns:
        ``(x, residuals)``: the iterates, and |b - A x| / |b| of each task, ``[T]``; 0 where b is 0, and so is x.

    Reference: Hestenes & Stiefel 1952, "Methods of conjugate gradients for solving linear systems".
    """
    x, r, d = {name: torch.zeros_like(w) for name, w in b.items()}, b, b
    square = b_square = _dot(b, b)
    active = b_square != 0
    on_cpu = square.device.type == "cpu"
    for iteration in range(steps):
        if on_cpu and not active.any():  # elsewhere reading it waits for the device, and a stopped task changes nothing
            break
        ad = product(d)
        curvature = _dot(d, ad)
        convex = active & ~(curvature <= 0)
        alpha = torch.where(convex, square / torch.where(convex, curvature, 1.0), 0.0)
        if iteration == 0:
            alpha = torch.where(active & ~convex, 1.0, alpha)
        x, r = _axpy(x, alpha, d), _axpy(r, -alpha, ad)
        previous, square = square, _dot(r, r)
        active = convex & (square > tolerance**2 * b_square)
        d = _axpy(r, torch.where(active, square / torch.where(active, previous, 1.0), 0.0), d)
    return x, (square / torch.where(b_square != 0, b_square, 1.0)).sqrt()


def _dot(a: Params, b: Params) -> Tensor:
    """Return inner products over all parameters of each task, ``[T]``."""
    return torch.stack([(w * b[name]).reshape(len(w), -1).sum(dim=1) for name, w in a.items()]).sum(dim=0)


def _axpy(a: Params, factor: Tensor, b: Params) -> Params:
    """Return a + factor b, with one factor for each task, ``[T]``."""
    return {name: w + broadcast_over_params(factor, w) * b[name] for name, w in a.items()}
