"""The two ends of every engine: the query pass that the meta-gradient starts from, and the result."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from metalearn.errors import NonFiniteLossError
from metalearn.inner import task_losses
from metalearn.params import gradients
from metalearn.types import Episodes, Forward, Loss, MetaGradient, Params


class Query(NamedTuple):
    """The query pass at theta_K, detached: losses ``[T]``, predictions ``[T, Q, ...]``, and lam_K."""

    losses: Tensor
    predictions: Tensor
    lam: Params


def query_pass(forward: Forward, fast: Params, episodes: Episodes, loss: Loss) -> Query:
    """The query losses at theta_K, and where the adjoint starts: lam_K = d(mean query loss) / d theta_K.

    Its activations are freed before this returns.
    """
    with torch.enable_grad():
        at = {name: w.detach().requires_grad_() for name, w in fast.items()}
        losses, predictions = task_losses(forward, at, episodes.query_x, episodes.query_y, loss=loss)
        lam = gradients(losses.mean(), at, create_graph=False)
    return Query(losses.detach(), predictions.detach(), lam)


def refuse_nonfinite(support_losses: list[Tensor], query_losses: Tensor) -> None:
    """Refuse to differentiate a loss that is NaN or infinite.

    Args:
        support_losses: before each inner step, ``[T]`` each.
        query_losses: ``[T]``.

    Raises:
        NonFiniteLossError: naming the first inner step, and of its tasks the first.
    """
    losses = torch.stack([*support_losses, query_losses]).detach()
    finite = torch.isfinite(losses)
    if finite.all():
        return
    step, task = (int(i) for i in (~finite).nonzero()[0])
    before = losses[step - 1, task].item() if step > 0 else None
    kind = "support" if step < len(support_losses) else "query"
    raise NonFiniteLossError(kind, task=task, step=step, value=losses[step, task].item(), before=before)


def outcome(grads: Params, query: Query | tuple[Tensor, Tensor], support_losses: list[Tensor]) -> MetaGradient:
    """What every engine returns, from gradients, query losses and predictions, and each step's support losses."""
    losses, predictions = query[0].detach(), query[1].detach()
    return MetaGradient(
        loss=losses.mean(),
        grads=grads,
        predictions=predictions,
        support_loss=torch.stack([s.mean() for s in support_losses]) if support_losses else losses.new_empty(0),
    )


def sum_over_tasks(lam: Params) -> Params:
    """The transpose of ``stack``: theta is shared by all tasks, so their adjoints ``[T, ...]`` add up to ``[...]``."""
    return {name: w.sum(dim=0) for name, w in lam.items()}
