"""The inner loop: adapt the parameters of each task; independent of how the meta-gradient is computed."""

from typing import Any

from metalearn.core.deprecation import warn_renamed
from metalearn.inner.config import LEARNED_LR_MODES, Initializer, InnerLoop
from metalearn.inner.diagnostics import check_losses_finite, explain_torch_errors, loss_checks_deferred
from metalearn.inner.initializers import PrototypeHead, ZeroContext
from metalearn.inner.loop import adapt, inner_step, support_gradients
from metalearn.inner.losses import (
    OuterLoss,
    TaskLosses,
    predict,
    query_loss,
    task_losses,
    task_predictions,
    total_support_loss,
)
from metalearn.inner.meta_tensors import check_meta, merge_meta, split_meta, taken_by
from metalearn.inner.state import (
    InnerState,
    adapted_param_names,
    apply_update,
    check_params_match_config,
    init_state,
    lr_key,
    meta_params_at_step,
    params_at_step,
    with_learned_lrs,
    with_per_step_params,
    with_transform,
)
from metalearn.inner.transforms import GradientTransform, MetaCurvature
from metalearn.inner.update_rules import (
    SEPARATOR,
    SGD,
    Adagrad,
    Adam,
    Momentum,
    RMSprop,
    UpdateRule,
    state_key,
    without_state,
)

__all__ = [
    "LEARNED_LR_MODES",
    "SEPARATOR",
    "SGD",
    "Adagrad",
    "Adam",
    "GradientTransform",
    "Initializer",
    "InnerLoop",
    "InnerState",
    "MetaCurvature",
    "Momentum",
    "OuterLoss",
    "PrototypeHead",
    "RMSprop",
    "TaskLosses",
    "UpdateRule",
    "ZeroContext",
    "adapt",
    "adapted_param_names",
    "apply_update",
    "check_losses_finite",
    "check_meta",
    "check_params_match_config",
    "explain_torch_errors",
    "init_state",
    "inner_step",
    "loss_checks_deferred",
    "lr_key",
    "merge_meta",
    "meta_params_at_step",
    "params_at_step",
    "predict",
    "query_loss",
    "split_meta",
    "state_key",
    "support_gradients",
    "taken_by",
    "task_losses",
    "task_predictions",
    "total_support_loss",
    "with_learned_lrs",
    "with_per_step_params",
    "with_transform",
    "without_state",
]


def __getattr__(name: str) -> Any:
    if name == "state_name":
        warn_renamed("metalearn.inner.state_name", "state_key", stacklevel=2)
        return state_key
    raise AttributeError(f"module 'metalearn.inner' has no attribute {name!r}")
