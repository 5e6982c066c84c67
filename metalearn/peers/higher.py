"""higher's differentiable optimiser, used as its own examples use it: one task after the other, on patched modules."""

from __future__ import annotations

import higher
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from metalearn.inner import InnerLoop
from metalearn.params import gradients
from metalearn.peers.one_by_one import gathered
from metalearn.types import Episodes, Loss, MetaGradient, Params


def meta_gradient(
    module: nn.Module, episodes: Episodes, inner: InnerLoop, *, loss: Loss = cross_entropy
) -> MetaGradient:
    """As ``metalearn.meta_gradient``, at the module's own parameters; ``engine`` and ``task_chunk`` mean nothing here.

    The module is not changed: neither its parameters nor their ``.grad``.

    Reference: Grefenstette et al. 2019, arXiv 1910.01727; its ``examples/maml-omniglot.py``, and for the first order
    https://github.com/facebookresearch/higher/issues/63.
    """
    trainable: Params = {name: p for name, p in module.named_parameters() if p.requires_grad}
    # Of the trainable parameters alone: in the first order, higher's step thaws every parameter that it is given.
    optimiser = torch.optim.SGD(trainable.values(), lr=inner.lr)
    grads = {name: torch.zeros_like(p) for name, p in trainable.items()}
    losses, predictions, support_losses = [], [], []
    for support_x, support_y, query_x, query_y in zip(
        episodes.support_x, episodes.support_y, episodes.query_x, episodes.query_y, strict=True
    ):
        with higher.innerloop_ctx(
            module, optimiser, copy_initial_weights=False, track_higher_grads=inner.second_order
        ) as (learner, differentiable):
            for _ in range(inner.steps):
                support_loss = loss(learner(support_x), support_y)
                support_losses.append(support_loss.detach())
                differentiable.step(support_loss)
            prediction = learner(query_x)
            query_loss = loss(prediction, query_y)
            at = trainable
            if not inner.second_order:  # each step cut the graph; theta gets the gradient at the adapted weights
                adapted = zip(module.named_parameters(), learner.parameters(), strict=True)
                at = {name: fast for (name, p), fast in adapted if p.requires_grad}
            for name, g in gradients(query_loss / episodes.tasks, at, create_graph=False).items():
                grads[name] += g
        losses.append(query_loss.detach())
        predictions.append(prediction.detach())
    return gathered(grads, losses, predictions, support_losses)
