"""Reptile: theta moves towards the result of K plain training steps; nothing is differentiated twice.

    theta <- theta + eps * mean_t (theta_{K,t} - theta)        (Nichol et al. 2018, arXiv 1803.02999, algorithm 2)
    grads = mean_t (theta - theta_{K,t}) / alpha               (section 3: for any outer optimiser)

Gradient descent on ``grads`` with the outer rate alpha eps is the first line. After one plain step they are the
gradient of the mean loss over tasks, which is joint training; it is meta-learning from the second step on (section 5).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from metalearn.core.types import Episodes, Forward, Loss, MetaGradient, Params
from metalearn.inner import InnerLoop, check_losses_finite, params_at_step, query_loss, split_meta, task_losses
from metalearn.metagrad.common import build_result, check_unsupported_settings, take_inner_steps

_UNSUPPORTED = {
    "learned_lr": "step sizes are not displaced by an inner step",
    "transform": "what it learns is not displaced by an inner step",
    "query_weights": "there is no query set, and so no query loss to weigh",
    "per_step_params": "no step displaces the parameters that the model is given after the last one",
    "lr_scale": "the displacement is divided by the one step size",
    "initializer": "theta moves towards theta_K, which says nothing if tasks do not start from theta",
}


def reptile(forward: Forward, params: Params, episodes: Episodes, inner: InnerLoop, loss: Loss) -> MetaGradient:
    """Compute the displacement of one chunk of tasks over the inner step size; arguments as for ``meta_gradient``.

    Reptile's training tasks have no query set: each is adapted to its support and query examples together,
    ``[T, S + Q, ...]``. No graph is built, and ``inner.second_order`` and ``inner.engine`` change nothing. Every rule
    works, and so does ``inner.adapted_params``.

    Returns:
        ``grads``: mean over tasks of (theta - theta_K) / ``inner.lr``; zeros where nothing is adapted. ``loss``
        and ``predictions`` are those of theta_K on the query sets, which it was adapted to: a training loss that does
        not measure how well a new task is learned. ``support_loss``: before each step, over support and query examples.

    Raises:
        ValueError: if ``inner`` has a setting that Reptile has no gradient for: ``learned_lr``, ``transform``,
            ``query_weights``, ``per_step_params``, ``lr_scale`` or ``initializer``; or meta-learned tensors.
        NonFiniteLossError: if a loss is NaN or infinite.
    """
    check_unsupported_settings("reptile", "Reptile", inner, _UNSUPPORTED)
    if meta := split_meta(params)[1]:
        raise ValueError(f"reptile: meta={list(meta)}: no inner step displaces these, so that they have no gradient.")
    x = tree_map(_join_sets, episodes.support_x, episodes.query_x)
    y = tree_map(_join_sets, episodes.support_y, episodes.query_y)
    together = Episodes(x, y, episodes.query_x, episodes.query_y)
    with torch.no_grad():
        state, trajectory = take_inner_steps(forward, params, together, inner, loss, checkpoint_every=None)
        fast = params_at_step(state, inner, inner.steps)
        query = task_losses(forward, fast, episodes.query_x, episodes.query_y, loss=query_loss(loss))
        grads = {name: (p - state[name]).mean(dim=0) / inner.lr for name, p in params.items()}
    check_losses_finite(trajectory.support_losses, query.losses)
    return build_result(grads, query.losses, query.predictions, trajectory.support_losses)


def _join_sets(support: Tensor, query: Tensor) -> Tensor:
    return torch.cat([support, query], dim=1)
