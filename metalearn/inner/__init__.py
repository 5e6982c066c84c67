"""The inner loop: how one task's parameters are adapted, knowing nothing of how that is differentiated."""

from metalearn.inner.loop import InnerLoop, TaskLosses, adapt, inner_step, predict, task_losses

__all__ = ["InnerLoop", "TaskLosses", "adapt", "inner_step", "predict", "task_losses"]
