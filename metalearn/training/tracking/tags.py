"""Tags of TensorBoard's curves. It lists their groups by the alphabet: accuracy, cost, gradients, loss, optimizer."""

from __future__ import annotations

import re

_TRAINING = {
    "query_loss": "loss/query",
    "support_loss": "loss/support",
    "query_accuracy": "accuracy/train",
    "query_mse": "mse/train",
}
_FORMER = (
    (r"train/query_loss", "loss/query"),
    (r"train/support_loss", "loss/support"),
    (r"train/skipped", "optimizer/skipped"),
    (r"train/query_(accuracy|mse)", r"\1/train"),
    (r"train/grad_norm", "gradients/norm"),
    (r"train/(.+)", r"gradients/\1"),
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


def present_tag(tag: str) -> str:
    """Return the tag that a curve of an earlier version would have now.

    Examples:
        >>> present_tag("validation/accuracy_low")
        'accuracy/validation_low'
    """
    for pattern, present in _FORMER:
        if found := re.fullmatch(pattern, tag):
            return found.expand(present)
    return tag
