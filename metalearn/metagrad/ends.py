"""The two ends of every engine: the query pass that the meta-gradient starts from, and the result."""

from __future__ import annotations

import torch
from torch import Tensor

from metalearn.inner import TaskLosses, task_losses
from metalearn.params import gradients
from metalearn.types import Episodes, Forward, Loss, MetaGradient, Params


def query_pass(forward: Forward, fast: Params, episodes: Episodes, loss: Loss) -> tuple[TaskLosses, Params]:
    """The query losses and predictions at theta_K, detached, and lam_K = d(mean query loss) / d theta_K.

    Its activations are freed before this returns.
    """
    with torch.enable_grad():
        at = {name: w.detach().requires_grad_() for name, w in fast.items()}
        losses, predictions = task_losses(forward, at, episodes.query_x, episodes.query_y, loss=loss)
        lam = gradients(losses.mean(), at, create_graph=False)
    return TaskLosses(losses.detach(), predictions.detach()), lam


def outcome(grads: Params, query: TaskLosses, support_losses: list[Tensor]) -> MetaGradient:
    """What every engine returns, from gradients, query losses and predictions, and each step's support losses."""
    losses, predictions = query.losses.detach(), query.predictions.detach()
    return MetaGradient(
        loss=losses.mean(),
        grads=grads,
        predictions=predictions,
        support_loss=torch.stack([s.mean() for s in support_losses]) if support_losses else losses.new_empty(0),
    )


def sum_over_tasks(lam: Params) -> Params:
    """The transpose of ``stack``: theta is shared by all tasks, so their adjoints ``[T, ...]`` add up to ``[...]``."""
    return {name: w.sum(dim=0) for name, w in lam.items()}
