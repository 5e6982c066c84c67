"""Exact second order without a graph of a gradient: one Hessian-vector product for every inner step.

    lam_K = dL_query(theta_K),    lam_k = lam_{k+1} - lr H_k lam_{k+1},    meta-gradient = lam_0

(for a plain step; for any other ``vjp_update`` takes the place of ``lr`` and of the identity, with what is
learned or remembered among lam's entries: learned step sizes get -lam * g_k)

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
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from metalearn.core.functional import vjp
from metalearn.core.types import Episodes, Forward, Loss, MetaGradient, Params
from metalearn.derivatives.hvp import value_and_hvp
from metalearn.inner import (
    InnerLoop,
    adapted_param_names,
    apply_update,
    params_at_step,
    state_key,
    support_gradients,
    total_support_loss,
    without_state,
)
from metalearn.metagrad.common import run_forward
from metalearn.metagrad.trajectory import Snapshot

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

    ``watch`` is shown k and lam_k, each ``[T, ...]``, for k = K, ..., 0 (for K alone where nothing changes it
    on its way: in first order, if steps are plain).
    """
    way = run_forward(forward, params, episodes, inner, loss)
    lam, repeated = way.lam, {}
    watch(inner.steps, lam)
    for start in way.trajectory.back():
        lam, v = _through_update(forward, episodes, inner, loss, start, lam)
        if inner.second_order:

            def support_loss(fast: Params, k: int = start.step) -> Tensor:
                at = params_at_step(fast, inner, k)
                return total_support_loss(forward, at, episodes.support_x, episodes.support_y, loss=loss)

            repeated[start.step], product = support_hvp(forward, support_loss, start, v)
            lam = {name: w + product[name] if name in product else w for name, w in lam.items()}
        lam = way.add_query_gradient(start, lam)
        watch(start.step, lam)
    way.trajectory.check_recomputation(repeated)
    return way.outcome(lam)


def _through_update(
    forward: Forward, episodes: Episodes, inner: InnerLoop, loss: Loss, start: Snapshot, lam: Params
) -> tuple[Params, Params]:
    """Lam through what a step does beside taking a gradient, and the direction v of the Hessian-vector product.

    v has the model's parameters, 0 where nothing is adapted.
    """
    own = adapted_param_names(start.carry, inner)
    model = without_state(start.carry)
    if inner.plain:
        return lam, {n: -inner.lr * lam[n] if n in own else torch.zeros_like(lam[n]) for n in model}
    grads = {name: torch.zeros_like(start.carry[name]) for name in own}
    back, of_gradient, depends = vjp_update(start.carry, grads, inner, start.step, lam)
    if depends:
        with start.replay_rng(), torch.no_grad():  # no graph of theirs
            grads, _ = support_gradients(
                forward, start.carry, episodes.support_x, episodes.support_y, inner, loss=loss, k=start.step
            )
        back, of_gradient, _ = vjp_update(start.carry, grads, inner, start.step, lam)
    return back, {n: of_gradient[n] if n in of_gradient else torch.zeros_like(lam[n]) for n in model}


class UpdatePullBack(NamedTuple):
    """The transposed Jacobians of ``apply_update`` times lam.

    Args:
        of_carry: in what is carried.
        of_gradient: in the gradients.
        depends: whether they are others where the gradients or the carry are: not so for SGD, momentum and decay.
    """

    of_carry: Params
    of_gradient: Params
    depends: bool


def vjp_update(carry: Params, grads: Params, inner: InnerLoop, k: int, lam: Params) -> UpdatePullBack:
    """Lam through ``apply_update``, and whether that would be the same with any other gradients."""
    with torch.enable_grad():
        at, g = ({name: w.detach().requires_grad_() for name, w in tree.items()} for tree in (carry, grads))
        after = apply_update(at, g, inner, k)
        inputs = at | {state_key("gradient", name): w for name, w in g.items()}
        products = vjp(after, inputs, lam, create_graph=True)  # with a graph where the Jacobian is no constant
    values = {name: p.detach() for name, p in products.items()}
    return UpdatePullBack(
        of_carry={name: values[name] for name in carry},
        of_gradient={name: values[state_key("gradient", name)] for name in grads},
        depends=any(p.requires_grad for p in products.values()),
    )


_REVERSE_ONLY = WeakIdKeyDictionary()
"""Models that were found not to go through forward mode, as keys, so that it is tried once for each."""


def support_hvp(
    forward: Forward, support_loss: Callable[[Params], Tensor], start: Snapshot, v: Params
) -> tuple[Tensor, Params]:
    """Support loss at the start of a step, and H v: by forward over reverse, or else by reverse over reverse."""
    at = {name: start.carry[name] for name in v}
    if forward not in _REVERSE_ONLY:
        try:
            with start.replay_rng():
                return value_and_hvp(support_loss, at, v, mode="forward_over_reverse")
        except NotImplementedError as error:
            reason = re.sub(r"\. \(hvp's mode=.*", "", str(error).splitlines()[0])
        # Out here, as the error's trace would keep the failed attempt's activations.
        _say_once(reason)
        with suppress(TypeError):  # of what has no weak references: it is tried again
            _REVERSE_ONLY[forward] = True
    with start.replay_rng():
        return value_and_hvp(support_loss, at, v, mode="reverse_over_reverse")


@functools.cache
def _say_once(reason: str) -> None:
    log.warning(
        "engine=adjoint: an operation cannot be differentiated in forward mode (%s), so that Hessian-vector products "
        "are taken by reverse over reverse: as exact, with more memory.",
        reason,
    )
