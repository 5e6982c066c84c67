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
import re
from collections.abc import Callable
from weakref import WeakSet

import torch
from torch import Tensor

from metalearn.derivatives.products import value_and_hvp
from metalearn.inner import InnerLoop, total_support_loss
from metalearn.metagrad.ends import outcome, sum_over_tasks, way_there
from metalearn.metagrad.trajectory import Start
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

    def support_loss(fast: Params) -> Tensor:
        return total_support_loss(forward, fast, episodes.support_x, episodes.support_y, loss=loss)

    query, lam, trajectory = way_there(forward, params, episodes, inner, loss)
    watch(inner.steps, lam)
    repeated = {}
    for start in trajectory.back():
        repeated[start.step], product = hessian_product(forward, support_loss, start, lam)
        lam = {name: lam[name] - inner.lr * product[name] for name in lam}
        watch(start.step, lam)
    trajectory.refuse_other(repeated)
    return outcome(sum_over_tasks(lam), query, trajectory.support_losses)


_REVERSE_ONLY: WeakSet[Forward] = WeakSet()
"""Models that were found not to go through forward mode, so that it is tried once for each."""


def hessian_product(
    forward: Forward, support_loss: Callable[[Params], Tensor], start: Start, v: Params
) -> tuple[Tensor, Params]:
    """Support loss at the start of a step, and H v: by forward over reverse, or else by reverse over reverse."""
    if forward not in _REVERSE_ONLY:
        try:
            with start.random_draws_repeated():
                return value_and_hvp(support_loss, start.fast, v, mode="forward_over_reverse")
        except (RuntimeError, AssertionError) as error:  # NotImplementedError is a RuntimeError
            if isinstance(error, torch.OutOfMemoryError) or not _lacks_forward_mode(error):
                raise
            reason = re.sub(r": hvp's mode=.*| that does not support it.*", "", str(error).splitlines()[0])
        # Out here, as the error's trace would keep the failed attempt's activations.
        _say_once(reason)
        _REVERSE_ONLY.add(forward)
    with start.random_draws_repeated():
        return value_and_hvp(support_loss, start.fast, v, mode="reverse_over_reverse")


def _lacks_forward_mode(error: Exception) -> bool:
    """Whether an operation has no forward-mode formula: a kernel says so, and a custom Function under vmap asserts."""
    known = r"forward[- ](AD|mode)|\bjvp\b|flat_bdims must not be None"
    return isinstance(error, NotImplementedError) or re.search(known, str(error)) is not None


@functools.cache
def _say_once(reason: str) -> None:
    log.warning(
        "engine=adjoint: an operation cannot be differentiated in forward mode (%s), so that Hessian-vector products "
        "are taken by reverse over reverse: as exact, with more memory.",
        reason,
    )
