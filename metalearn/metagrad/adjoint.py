"""Exact second order without a graph of a gradient: one Hessian-vector product for every inner step.

    lam_K = dL_query(theta_K),    lam_k = lam_{k+1} - lr H_k lam_{k+1},    meta-gradient = lam_0

with H_k = d2 L_support(theta_k) and H_k v by forward over reverse, d/dt dL_support(theta_k + t v): the tangents of the
activations stand beside them, about twice the memory of a first-order step. (Mixed-mode differentiation of the inner
step, MixFlow-MG, arXiv 2505.00793, eq. 7.) Where an operation has no forward-mode formula the product is taken by
reverse over reverse, which is said once.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

from torch import Tensor

from metalearn.derivatives import hvp
from metalearn.inner import InnerLoop, inner_step, total_support_loss
from metalearn.metagrad.ends import outcome, query_pass, refuse_nonfinite, sum_over_tasks
from metalearn.metagrad.trajectory import Start, walk
from metalearn.params import stack
from metalearn.types import Episodes, Forward, Loss, MetaGradient, Params

log = logging.getLogger(__name__)


def adjoint(
    forward: Forward,
    params: Params,
    episodes: Episodes,
    inner: InnerLoop,
    loss: Loss,
    *,
    watch: Callable[[int, Params], None] = lambda k, lam: None,
) -> MetaGradient:
    """The meta-gradient of one chunk of tasks; arguments and result as in ``metalearn.meta_gradient``.

    ``watch`` is shown k and lam_k, each ``[T, ...]``, for k = K, ..., 0 (in first order, for K alone).
    """

    def step(fast: Params) -> tuple[Params, Tensor]:
        return inner_step(forward, fast, episodes.support_x, episodes.support_y, inner, loss=loss)

    def support_loss(fast: Params) -> Tensor:
        return total_support_loss(forward, fast, episodes.support_x, episodes.support_y, loss=loss)

    theta = {name: p.detach() for name, p in params.items()}
    every = inner.snapshot_every if inner.second_order else None
    fast, trajectory = walk(step, stack(theta, episodes.tasks), steps=inner.steps, every=every)
    query = query_pass(forward, fast, episodes, loss)
    del fast
    refuse_nonfinite(trajectory.support_losses, query.losses)
    lam, mode = query.lam, "forward_over_reverse"
    watch(inner.steps, lam)
    for below, start in enumerate(trajectory.back(), start=1):
        product, mode = hessian_product(support_loss, start, lam, mode)
        lam = {name: lam[name] - inner.lr * product[name] for name in lam}
        watch(inner.steps - below, lam)
    return outcome(sum_over_tasks(lam), query, trajectory.support_losses)


def hessian_product(f: Callable[[Params], Tensor], start: Start, v: Params, mode: str) -> tuple[Params, str]:
    """H v at the start of a step, and the mode to take from here on.

    That is ``mode``, or reverse over reverse once an operation was met that cannot be differentiated forwards.
    """
    try:
        with start.random_draws_repeated():
            return hvp(f, start.fast, v, mode=mode), mode
    except (RuntimeError, AssertionError) as error:  # NotImplementedError from kernels, others from custom Functions
        if mode != "forward_over_reverse":
            raise
        product = hessian_product(f, start, v, "reverse_over_reverse")
        _say_once(str(error).partition(" that does not support it")[0].partition("\n")[0] or type(error).__name__)
        return product


@functools.cache
def _say_once(reason: str) -> None:
    log.warning(
        "engine=adjoint: an operation cannot be differentiated in forward mode (%s), so that Hessian-vector products "
        "are taken by reverse over reverse: as exact, with more memory.",
        reason,
    )
