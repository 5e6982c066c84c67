"""learn2learn's MAML, used as its own examples use it: one task after the other, on clones of the module."""

from __future__ import annotations

import torch
from learn2learn.algorithms import MAML
from torch import nn
from torch.nn.functional import cross_entropy

from metalearn.inner import InnerLoop
from metalearn.peers.one_by_one import gathered
from metalearn.types import Episodes, Loss, MetaGradient


def meta_gradient(
    module: nn.Module, episodes: Episodes, inner: InnerLoop, *, loss: Loss = cross_entropy
) -> MetaGradient:
    """As ``metalearn.meta_gradient``, at the module's own parameters; ``engine`` and ``task_chunk`` mean nothing here.

    Reference: Arnold et al. 2020, arXiv 2008.12284; its ``examples/vision/maml_omniglot.py``.
    """
    maml = MAML(module, lr=inner.lr, first_order=not inner.second_order)
    maml.zero_grad()
    losses, predictions, support_losses = [], [], []
    for support_x, support_y, query_x, query_y in zip(
        episodes.support_x, episodes.support_y, episodes.query_x, episodes.query_y, strict=True
    ):
        learner = maml.clone()
        for _ in range(inner.steps):
            support_loss = loss(learner(support_x), support_y)
            support_losses.append(support_loss.detach())
            learner.adapt(support_loss)
        prediction = learner(query_x)
        query_loss = loss(prediction, query_y)
        (query_loss / episodes.tasks).backward()
        losses.append(query_loss.detach())
        predictions.append(prediction.detach())
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in module.named_parameters()}
    return gathered(grads, losses, predictions, support_losses)
