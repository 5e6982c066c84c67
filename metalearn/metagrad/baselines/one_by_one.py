"""What the other libraries share: they take one task after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from metalearn.core.types import MetaGradient, Params


def average_over_tasks(
    grads: Params, losses: list[Tensor], predictions: list[Tensor], support_losses: list[Tensor]
) -> MetaGradient:
    """A batch's result from its tasks'.

    Args:
        grads: of the mean query loss.
        losses: query losses, detached scalars, one a task.
        predictions: detached, ``[Q, ...]``, one a task.
        support_losses: detached scalars, the steps of the first task, then those of the next.
    """
    steps_of_tasks = torch.stack(support_losses).view(len(losses), -1) if support_losses else losses[0].new_empty(1, 0)
    return MetaGradient(
        loss=torch.stack(losses).mean(),
        grads=grads,
        predictions=torch.stack(predictions),
        support_loss=steps_of_tasks.mean(dim=0),
    )
