"""TorchOpt's functional SGD and Adam, used as in its own examples, but in a loop over tasks."""

from __future__ import annotations

from typing import Any

import torch
import torchopt
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from metalearn.core.params import grad_of
from metalearn.core.types import Episodes, Loss, MetaGradient, Params
from metalearn.inner import SGD, Adam, InnerLoop, Momentum
from metalearn.metagrad.baselines.common import (
    SupportedSettings,
    TaskResult,
    as_leaf_params,
    average_over_tasks,
    check_supported,
    sgd_arguments,
)

SUPPORTED: SupportedSettings = {"rule": (SGD, Momentum, Adam), "weight_decay": None}


def meta_gradient(
    module: nn.Module, episodes: Episodes, inner: InnerLoop, *, loss: Loss = cross_entropy, params: Params | None = None
) -> MetaGradient:
    """Compute ``metalearn.meta_gradient`` with SGD, ``Momentum`` or ``Adam``, as described by ``common.Baseline``.

    TorchOpt's ``MetaSGD`` gives the same numbers, but does not support frozen parameters, and writes to the module
    temporarily. Through its Adam the second order is NaN as soon as one entry of a support gradient is exactly 0 (a
    dead unit, a black pixel): it takes the derivative of sqrt at 0, which is infinite, times 0.

    Reference: Ren et al. 2023, JMLR 24(367), arXiv 2211.06934; its ``examples/FuncTorch/maml_omniglot_vmap.py``.
    """
    check_supported("TorchOpt", inner, SUPPORTED)
    theta = as_leaf_params(module, params, inner)

    def one_task(support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor) -> TaskResult:
        optimizer = _optimizer(inner)  # one for each task: its momentum depends on earlier calls
        buffers = {name: b.clone() for name, b in module.named_buffers()}
        fast, state, support_losses = theta, optimizer.init(theta), []
        for _ in range(inner.steps):
            support_loss = loss(functional_call(module, (fast, buffers), support_x), support_y)
            support_losses.append(support_loss.detach())
            grads = grad_of(support_loss, fast, create_graph=inner.second_order)
            updates, state = optimizer.update(grads, state, params=fast, inplace=False)
            fast = torchopt.apply_updates(fast, updates, inplace=False)
        prediction = functional_call(module, (fast, buffers), query_x)
        return TaskResult(loss(prediction, query_y), prediction, support_losses, theta)

    return average_over_tasks(one_task, theta, episodes)


def _optimizer(inner: InnerLoop) -> torchopt.base.GradientTransformation:
    rule = inner.rule
    if isinstance(rule, Adam):
        # As tensors: it takes 1 - beta ** step in float32 if beta is a Python number, and 1 - 0.999 to 4 digits.
        betas: Any = tuple(torch.tensor(beta, dtype=torch.float64) for beta in rule.betas)
        return torchopt.adam(lr=inner.lr, betas=betas, eps=rule.eps, weight_decay=inner.weight_decay)
    return torchopt.sgd(**sgd_arguments(inner))
