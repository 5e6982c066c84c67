"""Engine ``adjoint``: exact second order without a graph of a gradient, by one Hessian-vector product a step.

    lam_K = dL_query(theta_K),    lam_k = lam_{k+1} - lr H_k lam_{k+1},    meta-gradient = lam_0

(for a plain step; in general ``vjp_update`` replaces ``lr`` and the identity, and lam has entries for learned step
sizes, which get -lam * g_k, and for the rule's state)

with H_k = d2 L_support(theta_k) and H_k v by forward over reverse, d/dt dL_support(theta_k + t v): the tangents of the
activations take about as much memory again as a first-order step. (Mixed-mode differentiation of the inner step,
MixFlow-MG, arXiv 2505.00793, eq. 7.) Where an operation has no forward-mode formula the product is taken by reverse
over reverse; a warning is logged once.
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

from metalearn.core.params import vjp
from metalearn.core.types import Episodes, Forward, Loss, MetaGradient, Params
from metalearn.derivatives.hvp import value_and_hvp
from metalearn.inner import (
    InnerLoop,
    InnerState,
    adapted_param_names,
    apply_update,
    params_at_step,
    state_key,
    support_gradients,
    total_support_loss,
    without_state,
)
from metalearn.metagrad.common import run_forward
from metalearn.metagrad.trajectory import StepCheckpoint

log = logging.getLogger(__name__)


def adjoint(
    forward: Forward,
    params: Params,
    episodes: Episodes,
    inner: InnerLoop,
    loss: Loss,
    *,
    callback: Callable[[int, Params], None] = lambda k, lam: None,
    forward_mode: bool = True,
) -> MetaGradient:
    """Compute the meta-gradient of one chunk of tasks; arguments and result as for ``metalearn.meta_gradient``.

    ``callback`` is called with k and lam_k, each ``[T, ...]``, for k = K, ..., 0; for K alone if every
    step's Jacobian is the identity: in first order, if steps are plain. Without ``forward_mode``, Hessian-vector
    products are by reverse over reverse, which is faster for a few tasks and takes more memory.
    """
    forward_pass = run_forward(forward, params, episodes, inner, loss)
    lam, recomputed = forward_pass.lam, {}
    callback(inner.steps, lam)
    for checkpoint in forward_pass.trajectory.reversed_steps():
        lam, v = _backward_through_update(forward, episodes, inner, loss, checkpoint, lam)
        if inner.second_order:  # the second-order term: H_k v

            def support_loss(fast: Params, k: int = checkpoint.step) -> Tensor:
                at = params_at_step(fast, inner, k)
                return total_support_loss(forward, at, episodes.support_x, episodes.support_y, loss=loss)

            recomputed[checkpoint.step], product = support_hvp(
                forward, support_loss, checkpoint, v, forward_mode=forward_mode
            )
            lam = {name: w + product[name] if name in product else w for name, w in lam.items()}
        lam = forward_pass.add_query_gradient(checkpoint, lam)
        callback(checkpoint.step, lam)
    return forward_pass.result(lam, recomputed)


def _backward_through_update(
    forward: Forward, episodes: Episodes, inner: InnerLoop, loss: Loss, checkpoint: StepCheckpoint, lam: Params
) -> tuple[Params, Params]:
    """Backpropagate lam through the update rule; also return the direction v for the Hessian-vector product.

    v has an entry for each parameter of the model: 0 where nothing is adapted.
    """
    state, k = checkpoint.state, checkpoint.step
    adapted, model = adapted_param_names(state, inner), without_state(state)
    if inner.is_plain_sgd:
        return lam, {n: -inner.lr * lam[n] if n in adapted else torch.zeros_like(lam[n]) for n in model}
    grads = {name: torch.zeros_like(state[name]) for name in adapted}
    in_state, in_grads, is_variable = vjp_update(state, grads, inner, k, lam)
    if is_variable:
        with checkpoint.replay_rng(), torch.no_grad():  # no graph of the gradients
            grads, _ = support_gradients(forward, state, episodes.support_x, episodes.support_y, inner, loss=loss, k=k)
        in_state, in_grads, _ = vjp_update(state, grads, inner, k, lam)
    return in_state, {n: in_grads[n] if n in in_grads else torch.zeros_like(lam[n]) for n in model}


class UpdateVJP(NamedTuple):
    """The transposed Jacobians of ``apply_update`` times lam."""

    in_state: Params
    in_grads: Params
    is_variable: bool  # whether they change with the gradients or the state: not so for SGD, momentum and decay


def vjp_update(state: InnerState, grads: Params, inner: InnerLoop, k: int, lam: Params) -> UpdateVJP:
    """Backpropagate lam through ``apply_update``, and find out whether other gradients would change the result."""
    with torch.enable_grad():
        at, g = ({name: w.detach().requires_grad_() for name, w in tree.items()} for tree in (state, grads))
        after = apply_update(at, g, inner, k)
        inputs = at | {state_key("gradient", name): w for name, w in g.items()}
        products = vjp(after, inputs, lam, create_graph=True)  # with a graph where the Jacobian is not constant
    values = {name: p.detach() for name, p in products.items()}
    return UpdateVJP(
        in_state={name: values[name] for name in state},
        in_grads={name: values[state_key("gradient", name)] for name in grads},
        is_variable=any(p.requires_grad for p in products.values()),
    )


_NO_FORWARD_MODE = WeakIdKeyDictionary()
"""Models that forward mode has failed for, as keys, so that it is tried once for each."""


def support_hvp(
    forward: Forward,
    support_loss: Callable[[Params], Tensor],
    checkpoint: StepCheckpoint,
    v: Params,
    *,
    forward_mode: bool = True,
) -> tuple[Tensor, Params]:
    """Return the support loss before a step, and H v: by forward over reverse, or else by reverse over reverse."""
    at = {name: checkpoint.state[name] for name in v}
    if forward_mode and forward not in _NO_FORWARD_MODE:
        try:
            with checkpoint.replay_rng():
                return value_and_hvp(support_loss, at, v, mode="forward_over_reverse")
        except NotImplementedError as error:
            reason = re.sub(r"\. \(hvp's mode=.*", "", str(error).splitlines()[0])
        # Outside of the except block, as the error's trace would keep the failed attempt's activations.
        _warn_once(reason)
        with suppress(TypeError):  # a model without weak references is tried again each time
            _NO_FORWARD_MODE[forward] = True
    with checkpoint.replay_rng():
        return value_and_hvp(support_loss, at, v, mode="reverse_over_reverse")


@functools.cache
def _warn_once(reason: str) -> None:
    log.warning(
        "engine=adjoint: an operation cannot be differentiated in forward mode (%s), so that Hessian-vector products "
        "are taken by reverse over reverse: as exact, with more memory.",
        reason,
    )
