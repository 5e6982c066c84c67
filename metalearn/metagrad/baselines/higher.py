"""higher's differentiable optimizers, used as in its own examples: a loop over tasks, on patched modules."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import higher
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from metalearn.core.functional import grad_of
from metalearn.core.types import Episodes, Loss, MetaGradient, Params
from metalearn.inner import SGD, Adam, InnerLoop, Momentum
from metalearn.metagrad.baselines.common import (
    SupportedSettings,
    average_over_tasks,
    check_supported,
    iter_tasks,
    module_with_params,
)

SUPPORTED: SupportedSettings = {"rule": (SGD, Momentum, Adam), "weight_decay": None}


def meta_gradient(
    module: nn.Module,
    episodes: Episodes,
    inner: InnerLoop,
    *,
    loss: Loss = cross_entropy,
    params: Params | None = None,
) -> MetaGradient:
    """Compute ``metalearn.meta_gradient`` with SGD, ``Momentum`` or ``Adam``, as described by ``common.Peer``.

    Reference: Grefenstette et al. 2019, arXiv 1910.01727; its ``examples/maml-omniglot.py``, and for the first order
    https://github.com/facebookresearch/higher/issues/63.
    """
    check_supported("higher", inner, SUPPORTED)
    module, theta = module_with_params(module, params, inner)
    # Of the trainable parameters alone: in the first order, higher's step thaws every parameter that it is given.
    optimizer = _optimizer(theta, inner)
    # Weight decay passes on a derivative in the first order too, so that the graph may not be cut there.
    uncut = inner.second_order or inner.weight_decay > 0
    grads = {name: torch.zeros_like(p) for name, p in theta.items()}
    losses, predictions, support_losses = [], [], []
    for support_x, support_y, query_x, query_y in iter_tasks(episodes):
        with higher.innerloop_ctx(module, optimizer, copy_initial_weights=False, track_higher_grads=uncut) as (
            fmodel,
            opt,
        ):
            support_losses += _adapt(fmodel, opt, support_x, support_y, inner, loss)
            prediction = fmodel(query_x)
            query_loss = loss(prediction, query_y)
            at = theta
            if not uncut:  # each step cut the graph; theta gets the gradient at the adapted weights
                pairs = zip(module.named_parameters(), fmodel.parameters(), strict=True)
                at = {name: fast for (name, p), fast in pairs if p.requires_grad}
            for name, g in grad_of(query_loss / episodes.tasks, at, create_graph=False).items():
                grads[name] += g
        losses.append(query_loss.detach())
        predictions.append(prediction.detach())
    return average_over_tasks(grads, losses, predictions, support_losses)


def _adapt(fmodel: Any, opt: Any, support_x: Tensor, support_y: Tensor, inner: InnerLoop, loss: Loss) -> list[Tensor]:
    """Take the inner steps of one task; return the support losses before each."""
    zero_none_grads = _zero_none_grads(list(fmodel.parameters()), detach=not inner.second_order)
    losses = []
    for k in range(inner.steps):
        support_loss = loss(fmodel(support_x), support_y)
        losses.append(support_loss.detach())
        patched_adam = None
        if isinstance(inner.rule, Adam):  # higher adds eps to sqrt(v) before v is corrected for its start, torch after
            patched_adam = {"eps": [inner.rule.eps * math.sqrt(1 - inner.rule.betas[1] ** (k + 1))]}
        opt.step(support_loss, override=patched_adam, grad_callback=zero_none_grads)
    return losses


def _optimizer(theta: Params, inner: InnerLoop) -> torch.optim.Optimizer:
    rule, decay = inner.rule, inner.weight_decay
    if isinstance(rule, Adam):
        return torch.optim.Adam(theta.values(), lr=inner.lr, betas=rule.betas, eps=rule.eps, weight_decay=decay)
    momentum = rule.momentum if isinstance(rule, Momentum) else 0.0
    nesterov = isinstance(rule, Momentum) and rule.nesterov and momentum > 0  # torch refuses both; the same as none
    return torch.optim.SGD(theta.values(), lr=inner.lr, momentum=momentum, nesterov=nesterov, weight_decay=decay)


def _zero_none_grads(fast: Sequence[Tensor], *, detach: bool) -> Callable[[Sequence[Tensor | None]], list[Tensor]]:
    """Return a gradient callback that replaces ``None`` by 0, as higher skips momentum and decay for ``None``."""

    def callback(grads: Sequence[Tensor | None]) -> list[Tensor]:
        filled = [torch.zeros_like(p) if g is None else g for p, g in zip(fast, grads, strict=True)]
        return [g.detach() for g in filled] if detach else filled

    return callback
