"""TorchOpt's functional SGD, used as its own examples use it, but for one task after the other."""

from __future__ import annotations

import torch
import torchopt
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from metalearn.inner import InnerLoop
from metalearn.params import gradients
from metalearn.peers.one_by_one import gathered
from metalearn.types import Episodes, Loss, MetaGradient, Params


def meta_gradient(
    module: nn.Module, episodes: Episodes, inner: InnerLoop, *, loss: Loss = cross_entropy
) -> MetaGradient:
    """As ``metalearn.meta_gradient``, at the module's own parameters; ``engine`` and ``task_chunk`` mean nothing here.

    The module is not changed: neither its parameters nor their ``.grad``. TorchOpt's ``MetaSGD`` gives the same
    numbers, but refuses frozen parameters and writes to the module while it works.

    Reference: Ren et al. 2023, JMLR 24(367), arXiv 2211.06934; its ``examples/FuncTorch/maml_omniglot_vmap.py``.
    """
    optimiser = torchopt.sgd(lr=inner.lr)
    theta: Params = {name: p for name, p in module.named_parameters() if p.requires_grad}
    grads = {name: torch.zeros_like(p) for name, p in theta.items()}
    losses, predictions, support_losses = [], [], []
    for support_x, support_y, query_x, query_y in zip(
        episodes.support_x, episodes.support_y, episodes.query_x, episodes.query_y, strict=True
    ):
        buffers = {name: b.clone() for name, b in module.named_buffers()}
        fast, state = theta, optimiser.init(theta)
        for _ in range(inner.steps):
            support_loss = loss(functional_call(module, (fast, buffers), support_x), support_y)
            support_losses.append(support_loss.detach())
            step = gradients(support_loss, fast, create_graph=inner.second_order)
            updates, state = optimiser.update(step, state, inplace=False)
            fast = torchopt.apply_updates(fast, updates, inplace=False)
        prediction = functional_call(module, (fast, buffers), query_x)
        query_loss = loss(prediction, query_y)
        for name, g in gradients(query_loss / episodes.tasks, theta, create_graph=False).items():
            grads[name] += g
        losses.append(query_loss.detach())
        predictions.append(prediction.detach())
    return gathered(grads, losses, predictions, support_losses)
