"""The forward pass of T tasks, each under its own parameters: predictions and losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from metalearn.core.functional import check_forward, check_param_dict
from metalearn.core.types import Forward, Loss, Params, check_tensors
from metalearn.inner.batching import differentiable_layers, over_tasks
from metalearn.inner.diagnostics import check_no_inplace_writes, explain_torch_errors
from metalearn.models.kernels import kernels_support


class TaskLosses(NamedTuple):
    """Losses ``[T]`` and predictions ``[T, examples, ...]`` of T tasks."""

    losses: Tensor
    predictions: Tensor


def task_losses(forward: Forward, fast: Params, x: Tensor, y: Tensor, *, loss: Loss) -> TaskLosses:
    """Compute the loss of every task under its own parameters ``fast``, for inputs and targets ``[T, examples, ...]``.

    Raises:
        TypeError: if ``forward`` or ``loss`` does not return a tensor.
        ValueError: if ``loss`` returns more than one number for a task, or if the model changes an input or a parameter
            in place.
    """

    def one_task(params: Params, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        prediction = forward(params, x)
        check_tensors({"forward's prediction": prediction})
        return loss_of(prediction, y), prediction

    def loss_of(prediction: Tensor, y: Tensor) -> Tensor:
        value = loss(prediction, y)
        check_tensors({"the loss": value})
        return value

    with check_no_inplace_writes(_named_tensors(fast, x, y)):
        if (predictions := _batched_predictions(forward, fast, x)) is not None:
            losses = over_tasks(loss_of, predictions, y, model=forward, loss=loss)
        else:
            losses, predictions = over_tasks(one_task, fast, x, y, model=forward, loss=loss)
    if losses.ndim != 1:
        raise ValueError(
            f"loss: it gave {tuple(losses.shape[1:])} numbers for a task and must give one, the mean over the task's "
            "examples (reduction='mean')."
        )
    return TaskLosses(losses, predictions)


def _batched_predictions(forward: Forward, fast: Params, x: Tensor) -> Tensor | None:
    """Return every task's predictions without ``vmap``; ``None`` unless the model and the kernels support it."""
    batched: Callable[[Params, Tensor], Tensor | None] | None = getattr(forward, "batched_forward", None)
    if not (batched and x.ndim == 5 and kernels_support(fast, x)):
        return None
    with differentiable_layers():
        return batched(fast, x)


def task_predictions(forward: Forward, fast: Params, x: Tensor) -> Tensor:
    """Return every task's predictions ``[T, examples, ...]``, as ``task_losses`` computes them; differentiable."""
    with check_no_inplace_writes(_named_tensors(fast, x)):
        if (predictions := _batched_predictions(forward, fast, x)) is None:
            predictions = over_tasks(forward, fast, x, model=forward)
    return predictions


def predict(forward: Forward, fast: Params, x: Tensor) -> Tensor:
    """Predict for inputs ``x`` ``[T, examples, ...]`` of T tasks, each under its own parameters ``[T, ...]``."""
    check_forward(forward)
    check_param_dict(fast)
    check_tensors({"x": x, **_named_tensors(fast)})
    with explain_torch_errors({"x": x}, fast), check_no_inplace_writes(_named_tensors(fast, x)):
        predictions: Tensor = over_tasks(forward, fast, x, model=forward)
    return predictions


def _named_tensors(fast: Params, *examples: Tensor) -> dict[str, Tensor]:
    """Return tensors by their names in error messages."""
    named = {f"parameter '{name}'": w for name, w in fast.items()}
    return named | dict(zip(("the inputs x", "the targets y"), examples, strict=False))


def total_support_loss(forward: Forward, fast: Params, x: Tensor, y: Tensor, *, loss: Loss) -> Tensor:
    """Return the sum of the support losses: its gradient is each task's, its Hessian block-diagonal over tasks."""
    return task_losses(forward, fast, x, y, loss=loss).losses.sum()
