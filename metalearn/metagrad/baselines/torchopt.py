"""TorchOpt's functional SGD and Adam, used as its own examples use them, but for one task after the other."""

from __future__ import annotations

from typing import Any

import torch
import torchopt
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from metalearn.core.functional import grad_of
from metalearn.core.types import Episodes, Loss, MetaGradient, Params
from metalearn.inner import SGD, Adam, InnerLoop, Momentum
from metalearn.metagrad.baselines.common import leaves
from metalearn.metagrad.baselines.offers import SupportedSettings, check_supported
from metalearn.metagrad.baselines.one_by_one import average_over_tasks

SUPPORTED: SupportedSettings = {"rule": (SGD, Momentum, Adam), "weight_decay": None}


def meta_gradient(
    module: nn.Module,
    episodes: Episodes,
    inner: InnerLoop,
    *,
    loss: Loss = cross_entropy,
    params: Params | None = None,
) -> MetaGradient:
    """As ``metalearn.meta_gradient``; ``engine`` and ``task_chunk`` mean nothing here.

    The module is not changed: neither its parameters nor their ``.grad``. TorchOpt's ``MetaSGD`` gives the same
    numbers, but refuses frozen parameters and writes to the module while it works.

    Through its Adam the second order is NaN as soon as one entry of a support gradient is exactly 0 (a dead unit, a
    pixel that is black in all examples): it takes the derivative of sqrt at 0, which is infinite, times 0.

    Args:
        module: the model.
        episodes: T tasks.
        inner: the inner loop: SGD, ``Momentum`` or ``Adam``, each with weight decay or without.
        loss: one task's mean loss.
        params: theta, in place of the module's own parameters.

    Raises:
        NotOfferedError: for any other setting.
        ValueError: if ``params`` are not the module's.

    Reference: Ren et al. 2023, JMLR 24(367), arXiv 2211.06934; its ``examples/FuncTorch/maml_omniglot_vmap.py``.
    """
    check_supported("TorchOpt", inner, offers=SUPPORTED)
    theta = leaves(module, params, inner)
    grads = {name: torch.zeros_like(p) for name, p in theta.items()}
    losses, predictions, support_losses = [], [], []
    for support_x, support_y, query_x, query_y in zip(
        episodes.support_x, episodes.support_y, episodes.query_x, episodes.query_y, strict=True
    ):
        optimiser = _optimiser(inner)  # one a task: its momentum remembers whether it was called
        buffers = {name: b.clone() for name, b in module.named_buffers()}
        fast, state = theta, optimiser.init(theta)
        for _ in range(inner.steps):
            support_loss = loss(functional_call(module, (fast, buffers), support_x), support_y)
            support_losses.append(support_loss.detach())
            step = grad_of(support_loss, fast, create_graph=inner.second_order)
            updates, state = optimiser.update(step, state, params=fast, inplace=False)
            fast = torchopt.apply_updates(fast, updates, inplace=False)
        prediction = functional_call(module, (fast, buffers), query_x)
        query_loss = loss(prediction, query_y)
        for name, g in grad_of(query_loss / episodes.tasks, theta, create_graph=False).items():
            grads[name] += g
        losses.append(query_loss.detach())
        predictions.append(prediction.detach())
    return average_over_tasks(grads, losses, predictions, support_losses)


def _optimiser(inner: InnerLoop) -> torchopt.base.GradientTransformation:
    rule = inner.rule
    if isinstance(rule, Adam):
        # As tensors: it takes 1 - beta ** step in float32 if beta is a Python number, and 1 - 0.999 to 4 digits.
        betas: Any = tuple(torch.tensor(beta, dtype=torch.float64) for beta in rule.betas)
        return torchopt.adam(lr=inner.lr, betas=betas, eps=rule.eps, weight_decay=inner.weight_decay)
    momentum = rule.momentum if isinstance(rule, Momentum) else 0.0
    nesterov = isinstance(rule, Momentum) and rule.nesterov and momentum > 0  # refused together, and the same as none
    return torchopt.sgd(lr=inner.lr, momentum=momentum, nesterov=nesterov, weight_decay=inner.weight_decay)
