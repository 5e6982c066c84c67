"""The inner loop: how one task's parameters are adapted, knowing nothing of how that is differentiated."""

from metalearn.inner.config import LEARNED_LR_MODES, Initializer, InnerLoop
from metalearn.inner.diagnostics import check_losses_finite, explain_torch_errors, loss_checks_deferred
from metalearn.inner.initializers import PrototypeHead, ZeroContext
from metalearn.inner.loop import adapt, inner_step, support_gradients
from metalearn.inner.losses import TaskLosses, predict, task_losses, task_predictions, total_support_loss
from metalearn.inner.state import (
    adapted_param_names,
    apply_update,
    check_params_match_config,
    init_state,
    lr_key,
    meta_params_at_step,
    params_at_step,
    with_learned_lrs,
    with_per_step_params,
)
from metalearn.inner.update_rules import SEPARATOR, SGD, Adam, Momentum, UpdateRule, state_key, without_state

__all__ = [
    "LEARNED_LR_MODES",
    "SEPARATOR",
    "SGD",
    "Adam",
    "Initializer",
    "InnerLoop",
    "Momentum",
    "PrototypeHead",
    "TaskLosses",
    "UpdateRule",
    "ZeroContext",
    "adapt",
    "adapted_param_names",
    "apply_update",
    "check_losses_finite",
    "check_params_match_config",
    "explain_torch_errors",
    "init_state",
    "inner_step",
    "loss_checks_deferred",
    "lr_key",
    "meta_params_at_step",
    "params_at_step",
    "predict",
    "state_key",
    "support_gradients",
    "task_losses",
    "task_predictions",
    "total_support_loss",
    "with_learned_lrs",
    "with_per_step_params",
    "without_state",
]
