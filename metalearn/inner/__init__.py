"""The inner loop: how one task's parameters are adapted, knowing nothing of how that is differentiated."""

from metalearn.inner.loop import InnerLoop, TaskLosses, adapt, inner_step, predict, task_losses, total_support_loss
from metalearn.inner.refusals import explained, refuse_nonfinite

__all__ = [
    "InnerLoop",
    "TaskLosses",
    "adapt",
    "explained",
    "inner_step",
    "predict",
    "refuse_nonfinite",
    "task_losses",
    "total_support_loss",
]
