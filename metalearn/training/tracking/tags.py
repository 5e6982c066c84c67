"""Tags of TensorBoard's curves. It lists their groups by the alphabet: accuracy, cost, gradients, intervals, …"""

from __future__ import annotations

import re

_TRAINING = {
    "query_loss": "loss/query",
    "support_loss": "loss/support",
    "query_accuracy": "accuracy/train",
    "query_mse": "mse/train",
}
DESCRIPTIONS = (
    (r"accuracy/train", "Accuracy on the queries of training tasks after adaptation, mean since the last point."),
    (r"mse/train", "Mean squared error on the queries of training tasks after adaptation, mean since the last point."),
    (
        r"\w+/validation",
        "Mean over the validation tasks, adapted by inner.eval_steps; intervals/ has its 95% interval.",
    ),
    (r"intervals/.+", "An end of the mean's 95% interval over tasks."),
    (r"\w+/test", "Mean over the test tasks, of the parameters that were best in validation, at their meta-step."),
    (r"\w+/test_by_inner_step", "Test score after 0, 1, ... inner steps, which are the horizontal axis."),
    (
        r"\w+/test_nontransductive",
        "Test accuracy with each query predicted without the others, whose statistics BatchNorm would use.",
    ),
    (r"cost/meta_step_ms", "Milliseconds of a meta-step, mean since the last point, without validation and logging."),
    (r"cost/median_meta_step_ms", "Milliseconds of a meta-step, median over the whole training."),
    (r"cost/training_s", "Seconds spent in meta-steps so far, without validation and logging."),
    (r"cost/peak_mib", "Peak memory in MiB: what CUDA has allocated, or on a CPU the live tensors of one meta-step."),
    (
        r"gradients/cosine_first_vs_second",
        "Cosine between the first- and the second-order meta-gradient of the same "
        "tasks: at 1 the second-order term changes nothing.",
    ),
    (
        r"gradients/adjoint_norm/step_\d+",
        "Norm of a task's query gradient carried back to this inner step, mean over "
        "tasks: step 0 is second order, the last step first order.",
    ),
    (
        r"gradients/support_top_eigenvalue",
        "Largest eigenvalue of the support loss's Hessian: an inner step overshoots "
        "where inner.lr times it is above 2.",
    ),
    (r"gradients/norm", "Norm of the meta-gradient before clipping, mean since the last point."),
    (r"loss/query", "The loss that is meta-learned: of the queries after adaptation, mean since the last point."),
    (r"loss/support", "Loss of the support set before adaptation, mean since the last point."),
    (r"optimizer/lr", "Learning rate of the meta-optimizer."),
    (r"optimizer/skipped", "Meta-steps skipped so far, because a number in them was not finite."),
)
"""Patterns of tags, and what TensorBoard says of them."""
_FORMER = (
    (r"train/query_loss", "loss/query"),
    (r"train/support_loss", "loss/support"),
    (r"train/skipped", "optimizer/skipped"),
    (r"train/query_(accuracy|mse)", r"\1/train"),
    (r"train/grad_norm", "gradients/norm"),
    (r"train/(.+)", r"gradients/\1"),
    (r"(validation|test)/(accuracy|mse)(.*)_(low|high)", r"intervals/\2/\1\3_\4"),
    (r"(validation|test)/(accuracy|mse)(.*)", r"\2/\1\3"),
    (r"rates/(.+)", r"optimizer/learned_lr/\1"),
    (r"outer/lr", "optimizer/lr"),
    (r"grad/(.+)", r"gradients/\1"),
    (r"(?:time|memory)/(.+)", r"cost/\1"),
)
"""Patterns of the tags of earlier versions, and what they are now."""


def training_tag(metric: str) -> str:
    """Return the tag of a meta-step's metric: an engine's own ones, such as ``cg_residual``, are of the gradients."""
    return _TRAINING.get(metric, f"gradients/{metric.removeprefix('grad_')}")


def describe_tag(tag: str) -> str:
    """Return what TensorBoard says of a curve; empty for one that needs no words."""
    return next((text for pattern, text in DESCRIPTIONS if re.fullmatch(pattern, tag)), "")


def present_tag(tag: str) -> str:
    """Return the tag that a curve of an earlier version would have now.

    Examples:
        >>> present_tag("validation/accuracy_low")
        'intervals/accuracy/validation_low'
    """
    for pattern, present in _FORMER:
        if found := re.fullmatch(pattern, tag):
            return found.expand(present)
    return tag
