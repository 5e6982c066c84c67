"""MAML by composed transforms of ``torch.func``: ``vmap`` over tasks of ``grad`` around the inner steps' ``grad``.

    g = mean_t grad(theta -> L_query,t(theta_K,t)),    theta_{k+1,t} = theta_k,t - lr * grad(L_support,t)(theta_k,t)

functorch's example differentiates the mean of ``vmap``. With ``vmap`` between the two ``grad`` the second derivative is
off by 0.1 to 0.8% in float64 where BatchNorm has weights (torch 2.14.1; not without weights, nor with BatchNorm written
out), so that here ``vmap`` is outermost: the same number, and a gradient for each task before the mean.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.functional import cross_entropy

from metalearn.core.types import Episodes, Loss, MetaGradient, Params
from metalearn.inner import InnerLoop
from metalearn.metagrad.baselines.common import SupportedSettings, as_leaf_params, check_supported

SUPPORTED: SupportedSettings = {}


def meta_gradient(
    module: nn.Module, episodes: Episodes, inner: InnerLoop, *, loss: Loss = cross_entropy, params: Params | None = None
) -> MetaGradient:
    """Compute ``metalearn.meta_gradient`` with plain steps, all tasks at once, as described by ``common.Baseline``.

    Reference: functorch's ``examples/maml_omniglot/maml-omniglot-transforms.py``.
    """
    check_supported("torch.func", inner, SUPPORTED)
    theta = {name: p.detach() for name, p in as_leaf_params(module, params, inner).items()}
    constants = {name: p.detach() for name, p in module.named_parameters() if name not in theta}
    constants |= dict(module.named_buffers())

    def loss_and_prediction(fast: Params, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        prediction = functional_call(module, (fast, constants), (x,))
        return loss(prediction, y), prediction

    def one_task(theta: Params, *task: Tensor) -> tuple[Tensor, tuple[Tensor, list[Tensor]]]:
        support_x, support_y, query_x, query_y = task
        fast, support_losses = theta, []
        for _ in range(inner.steps):
            grads, (support_loss, _) = grad_and_value(loss_and_prediction, has_aux=True)(fast, support_x, support_y)
            support_losses.append(support_loss)
            fast = {n: p - inner.lr * (grads[n] if inner.second_order else grads[n].detach()) for n, p in fast.items()}
        query_loss, prediction = loss_and_prediction(fast, query_x, query_y)
        return query_loss, (prediction, support_losses)

    tasks = episodes.support_x, episodes.support_y, episodes.query_x, episodes.query_y
    of_tasks = vmap(grad_and_value(one_task, has_aux=True), in_dims=(None, 0, 0, 0, 0))
    grads, (losses, (predictions, support_losses)) = of_tasks(theta, *tasks)
    of_steps = [step.mean() for step in support_losses]
    return MetaGradient(
        loss=losses.mean(),
        grads={name: g.mean(dim=0) for name, g in grads.items()},
        predictions=predictions,
        support_loss=torch.stack(of_steps) if of_steps else losses.new_empty(0),
    )
