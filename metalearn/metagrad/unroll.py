"""Engine ``unroll``, the readable reference: K inner steps under ``create_graph=True``, then one backward.

    d L_query(theta_K) / d theta = (I - lr H_0) ... (I - lr H_{K-1}) dL_query(theta_K),    H_k = d2 L_support(theta_k)

Autograd forms the Hessian terms H_k because the inner gradients carry a graph. Memory grows with K, as every step's
graph is kept. ``second_order=False`` drops every H_k. (Finn et al. 2017, arXiv 1703.03400, sections 2.2 and 5.2.)
"""

from __future__ import annotations

import torch

from metalearn.core.params import grad_of
from metalearn.core.types import Episodes, Forward, Loss, MetaGradient, Params
from metalearn.inner import (
    InnerLoop,
    check_losses_finite,
    init_state,
    inner_step,
    params_at_step,
    query_loss,
    task_losses,
)
from metalearn.metagrad.common import build_result


def unroll(forward: Forward, params: Params, episodes: Episodes, inner: InnerLoop, loss: Loss) -> MetaGradient:
    """Compute the meta-gradient of one chunk of tasks; arguments and result as for ``metalearn.meta_gradient``."""
    support = (episodes.support_x, episodes.support_y)
    with torch.enable_grad():
        theta = {name: p.detach().requires_grad_() for name, p in params.items()}
        state = init_state(forward, theta, *support, inner)
        support_losses, objective = [], None
        for k, weight in enumerate(inner.query_loss_weights):
            if k > 0:
                state, losses = inner_step(forward, state, *support, inner, loss=loss, k=k - 1)
                support_losses.append(losses)
            if weight or k == inner.steps:
                fast = params_at_step(state, inner, k)
                query = task_losses(forward, fast, episodes.query_x, episodes.query_y, loss=query_loss(loss))
                objective = weight * query.losses if objective is None else objective + weight * query.losses
        assert objective is not None, "the last step's query loss is always taken"
        check_losses_finite(support_losses, objective)
        grads = grad_of(objective.mean(), theta, create_graph=False)
    return build_result(grads, objective, query.predictions, support_losses)
