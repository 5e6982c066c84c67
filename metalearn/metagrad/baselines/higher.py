"""higher's differentiable optimisers, used as in its own examples: one task after the other, on patched modules."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import higher
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from metalearn.core.functional import grad_of
from metalearn.core.types import Episodes, Loss, MetaGradient, Params
from metalearn.inner import SGD, Adam, InnerLoop, Momentum
from metalearn.metagrad.baselines.common import placed
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

    The module is not changed: neither its parameters nor their ``.grad``.

    Args:
        module: the model.
        episodes: T tasks.
        inner: the inner loop: SGD, ``Momentum`` or ``Adam``, each with weight decay or without.
        loss: one task's mean loss.
        params: theta, in place of the module's own parameters; the work is then done on a copy of the module.

    Raises:
        NotOfferedError: for any other setting.
        ValueError: if ``params`` are not the module's.

    Reference: Grefenstette et al. 2019, arXiv 1910.01727; its ``examples/maml-omniglot.py``, and for the first order
    https://github.com/facebookresearch/higher/issues/63.
    """
    check_supported("higher", inner, offers=SUPPORTED)
    module, theta = placed(module, params, inner)
    # Of the trainable parameters alone: in the first order, higher's step thaws every parameter that it is given.
    optimiser = _optimiser(theta, inner)
    # Weight decay passes on a derivative in the first order too, so that the graph may not be cut there.
    uncut = inner.second_order or inner.weight_decay > 0
    grads = {name: torch.zeros_like(p) for name, p in theta.items()}
    losses, predictions, support_losses = [], [], []
    for support_x, support_y, query_x, query_y in zip(
        episodes.support_x, episodes.support_y, episodes.query_x, episodes.query_y, strict=True
    ):
        with higher.innerloop_ctx(module, optimiser, copy_initial_weights=False, track_higher_grads=uncut) as (
            learner,
            differentiable,
        ):
            filled = _filled(list(learner.parameters()), constant=not inner.second_order)
            for k in range(inner.steps):
                support_loss = loss(learner(support_x), support_y)
                support_losses.append(support_loss.detach())
                differentiable.step(support_loss, override=_override(inner, k), grad_callback=filled)
            prediction = learner(query_x)
            query_loss = loss(prediction, query_y)
            at = theta
            if not uncut:  # each step cut the graph; theta gets the gradient at the adapted weights
                adapted = zip(module.named_parameters(), learner.parameters(), strict=True)
                at = {name: fast for (name, p), fast in adapted if p.requires_grad}
            for name, g in grad_of(query_loss / episodes.tasks, at, create_graph=False).items():
                grads[name] += g
        losses.append(query_loss.detach())
        predictions.append(prediction.detach())
    return average_over_tasks(grads, losses, predictions, support_losses)


def _optimiser(theta: Params, inner: InnerLoop) -> torch.optim.Optimizer:
    rule, decay = inner.rule, inner.weight_decay
    if isinstance(rule, Adam):
        return torch.optim.Adam(theta.values(), lr=inner.lr, betas=rule.betas, eps=rule.eps, weight_decay=decay)
    momentum = rule.momentum if isinstance(rule, Momentum) else 0.0
    nesterov = isinstance(rule, Momentum) and rule.nesterov and momentum > 0  # refused together, and the same as none
    return torch.optim.SGD(theta.values(), lr=inner.lr, momentum=momentum, nesterov=nesterov, weight_decay=decay)


def _override(inner: InnerLoop, k: int) -> dict[str, list[float]] | None:
    """Its Adam adds eps to sqrt(v) before v is corrected for its start at 0, and torch's, like ours, after that."""
    if not isinstance(inner.rule, Adam):
        return None
    return {"eps": [inner.rule.eps * math.sqrt(1 - inner.rule.betas[1] ** (k + 1))]}


def _filled(fast: Sequence[Tensor], *, constant: bool) -> Callable[[Sequence[Tensor | None]], list[Tensor]]:
    """What higher passes its gradients through: 0 instead of ``None``, for which it skips momentum and decay.

    ``constant``: without a graph, as in the first order.
    """

    def callback(grads: Sequence[Tensor | None]) -> list[Tensor]:
        filled = [torch.zeros_like(p) if g is None else g for p, g in zip(fast, grads, strict=True)]
        return [g.detach() for g in filled] if constant else filled

    return callback
