"""The inner loop: how one task's parameters are adapted, knowing nothing of how that is differentiated."""

from metalearn.inner.config import LEARNED_RATES, InnerLoop, Start
from metalearn.inner.diagnostics import checks_are_off, explained, refuse_nonfinite
from metalearn.inner.initializers import PrototypeHead, ZeroContext
from metalearn.inner.loop import adapt, inner_step, support_gradients
from metalearn.inner.losses import TaskLosses, predict, predictions_of_tasks, task_losses, total_support_loss
from metalearn.inner.state import (
    adapted_names,
    begin,
    check_settings,
    model_of,
    model_params,
    rate_name,
    update,
    with_learned,
    with_steps,
)
from metalearn.inner.update_rules import SEPARATOR, SGD, Adam, Momentum, UpdateRule, of_model, state_name

__all__ = [
    "LEARNED_RATES",
    "SEPARATOR",
    "SGD",
    "Adam",
    "InnerLoop",
    "Momentum",
    "PrototypeHead",
    "Start",
    "TaskLosses",
    "UpdateRule",
    "ZeroContext",
    "adapt",
    "adapted_names",
    "begin",
    "check_settings",
    "checks_are_off",
    "explained",
    "inner_step",
    "model_of",
    "model_params",
    "of_model",
    "predict",
    "predictions_of_tasks",
    "rate_name",
    "refuse_nonfinite",
    "state_name",
    "support_gradients",
    "task_losses",
    "total_support_loss",
    "update",
    "with_learned",
    "with_steps",
]
