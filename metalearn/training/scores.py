"""How good predictions are: accuracy of classes, or the mean squared error of numbers; and what is better."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

from metalearn.core.types import Loss


@dataclass(frozen=True)
class Metric:
    """What tasks are judged by.

    Args:
        name: in ``metrics.json`` and on curves.
        loss: what is trained.
        of: from predictions ``[T, Q, ...]`` and targets ``[T, Q, ...]`` to one number a task, ``[T]``.
        higher_is_better: what the best checkpoint is chosen by.
        in_percent: whether it is a share.
    """

    name: str
    loss: Loss
    of: Callable[[Tensor, Tensor], Tensor]
    higher_is_better: bool
    in_percent: bool

    def better(self, one: float, other: float) -> bool:
        """Whether the one is better than the other; what is not finite is worse than all else."""
        if not (math.isfinite(one) and math.isfinite(other)):
            return math.isfinite(one)
        return one > other if self.higher_is_better else one < other

    def text(self, value: float, *, digits: int = 2) -> str:
        """In words of tables."""
        return f"{value:.{digits}%}" if self.in_percent else f"{value:.{digits + 2}g}"


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of right predictions per task: ``[T, Q, N]`` and ``[T, Q]`` to ``[T]``."""
    return (logits.argmax(dim=-1) == labels).float().mean(dim=-1)


def squared_error(predictions: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error per task: both ``[T, Q, ...]`` to ``[T]``."""
    return (predictions - targets).square().flatten(1).mean(dim=1)


ACCURACY = Metric("accuracy", cross_entropy, accuracy, higher_is_better=True, in_percent=True)
MSE = Metric("mse", mse_loss, squared_error, higher_is_better=False, in_percent=False)
