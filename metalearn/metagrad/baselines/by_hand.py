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
    TaskResult,
    as_leaf_params,
    average_over_tasks,
    check_supported,
)

SUPPORTED: SupportedSettings = {}


def meta_gradient(
    module: nn.Module, episodes: Episodes, inner: InnerLoop, *, loss: Loss = cross_entropy, params: Params | None = None
) -> MetaGradient:
    """Compute ``metalearn.meta_gradient`` with plain steps, as described by ``common.Baseline``.

    Reference: Finn et al. 2017, arXiv 1703.03400, algorithm 2.
    """
    check_supported("the loop by hand", inner, SUPPORTED)
    theta = as_leaf_params(module, params, inner)

    def one_task(support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor) -> TaskResult:
        buffers = {name: b.clone() for name, b in module.named_buffers()}
        fast, support_losses = theta, []
        for _ in range(inner.steps):
            support_loss = loss(functional_call(module, (fast, buffers), (support_x,)), support_y)
            support_losses.append(support_loss.detach())
            grads = torch.autograd.grad(
                support_loss, list(fast.values()), create_graph=inner.second_order, materialize_grads=True
            )
            fast = {name: p - inner.lr * g for (name, p), g in zip(fast.items(), grads, strict=True)}
        prediction = functional_call(module, (fast, buffers), (query_x,))
        return TaskResult(loss(prediction, query_y), prediction, support_losses, theta)

    return average_over_tasks(one_task, theta, episodes)
