"""MAML without a library: a loop over tasks, ``autograd.grad(..., create_graph=True)``.

theta_{k+1} = theta_k - lr * dL_support(theta_k) / dtheta_k,    g = 1/T sum_t dL_query,t(theta_K,t) / dtheta
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from metalearn.core.types import Episodes, Loss, MetaGradient, Params
from metalearn.inner import InnerLoop
from metalearn.metagrad.baselines.common import (
    SupportedSettings,
    as_leaf_params,
    average_over_tasks,
    check_supported,
    iter_tasks,
)

SUPPORTED: SupportedSettings = {}


def meta_gradient(
    module: nn.Module,
    episodes: Episodes,
    inner: InnerLoop,
    *,
    loss: Loss = cross_entropy,
    params: Params | None = None,
) -> MetaGradient:
    """Compute ``metalearn.meta_gradient`` with plain steps, as described by ``common.Peer``.

    Reference: Finn et al. 2017, arXiv 1703.03400, algorithm 2.
    """
    check_supported("the loop by hand", inner, SUPPORTED)
    theta = as_leaf_params(module, params, inner)
    total = [torch.zeros_like(p) for p in theta.values()]
    losses, predictions, support_losses = [], [], []
    for support_x, support_y, query_x, query_y in iter_tasks(episodes):
        buffers = {name: b.clone() for name, b in module.named_buffers()}
        fast = theta
        for _ in range(inner.steps):
            support_loss = loss(functional_call(module, (fast, buffers), (support_x,)), support_y)
            support_losses.append(support_loss.detach())
            step = _gradients(support_loss, fast, create_graph=inner.second_order)
            fast = {name: p - inner.lr * g for (name, p), g in zip(fast.items(), step, strict=True)}
        prediction = functional_call(module, (fast, buffers), (query_x,))
        query_loss = loss(prediction, query_y)
        for g, task_g in zip(total, _gradients(query_loss / episodes.tasks, theta, create_graph=False), strict=True):
            g += task_g
        losses.append(query_loss.detach())
        predictions.append(prediction.detach())
    return average_over_tasks(dict(zip(theta, total, strict=True)), losses, predictions, support_losses)


def _gradients(loss: Tensor, at: Params, *, create_graph: bool) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, list(at.values()), create_graph=create_graph, materialize_grads=True)
