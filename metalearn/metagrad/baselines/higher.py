"""higher's differentiable optimizers, used as in its own examples: a loop over tasks, on patched modules."""

from __future__ import annotations

import math
from collections.abc import Sequence

import higher
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from metalearn.core.types import Episodes, Loss, MetaGradient, Params
from metalearn.inner import SGD, Adam, InnerLoop, Momentum
from metalearn.metagrad.baselines.common import (
    SupportedSettings,
    TaskResult,
    average_over_tasks,
    check_supported,
    module_with_params,
    sgd_arguments,
)

SUPPORTED: SupportedSettings = {"rule": (SGD, Momentum, Adam), "weight_decay": None}


def meta_gradient(
    module: nn.Module, episodes: Episodes, inner: InnerLoop, *, loss: Loss = cross_entropy, params: Params | None = None
) -> MetaGradient:
    """Compute ``metalearn.meta_gradient`` with SGD, ``Momentum`` or ``Adam``, as described by ``common.Baseline``.

    Reference: Grefenstette et al. 2019, arXiv 1910.01727; its ``examples/maml-omniglot.py``, and for the first order
    https://github.com/facebookresearch/higher/issues/63.
    """
    check_supported("higher", inner, SUPPORTED)
    module, theta = module_with_params(module, params, inner)
    # Of the trainable parameters alone: in the first order, higher's step thaws every parameter that it is given.
    optimizer = _optimizer(theta, inner)
    # Weight decay passes on a derivative in the first order too, so that the graph may not be cut there.
    uncut = inner.second_order or inner.weight_decay > 0
    context = {"copy_initial_weights": False, "track_higher_grads": uncut}

    def one_task(support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor) -> TaskResult:
        with higher.innerloop_ctx(module, optimizer, **context) as (fmodel, opt):
            first = list(fmodel.parameters())

            def zero_none_grads(grads: Sequence[Tensor | None]) -> list[Tensor]:
                """Replace ``None`` by 0, as higher skips momentum and decay for ``None``; detach in first order."""
                filled = [torch.zeros_like(p) if g is None else g for p, g in zip(first, grads, strict=True)]
                return filled if inner.second_order else [g.detach() for g in filled]

            support_losses = []
            for k in range(inner.steps):
                support_loss = loss(fmodel(support_x), support_y)
                support_losses.append(support_loss.detach())
                patched_adam = None
                if isinstance(inner.rule, Adam):  # higher adds eps to sqrt(v) before v is corrected, torch after
                    patched_adam = {"eps": [inner.rule.eps * math.sqrt(1 - inner.rule.betas[1] ** (k + 1))]}
                opt.step(support_loss, override=patched_adam, grad_callback=zero_none_grads)
            prediction = fmodel(query_x)
            at = theta
            if not uncut:  # each step cut the graph; theta gets the gradient at the adapted weights
                pairs = zip(module.named_parameters(), fmodel.parameters(), strict=True)
                at = {name: fast for (name, p), fast in pairs if p.requires_grad}
            return TaskResult(loss(prediction, query_y), prediction, support_losses, at)

    return average_over_tasks(one_task, theta, episodes)


def _optimizer(theta: Params, inner: InnerLoop) -> torch.optim.Optimizer:
    rule = inner.rule
    if isinstance(rule, Adam):
        decay = inner.weight_decay
        return torch.optim.Adam(theta.values(), lr=inner.lr, betas=rule.betas, eps=rule.eps, weight_decay=decay)
    return torch.optim.SGD(theta.values(), **sgd_arguments(inner))
