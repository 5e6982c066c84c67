"""The forward pass of T tasks, each under its own parameters: predictions and losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional

from metalearn.core.functional import check_forward
from metalearn.core.params import check_param_dict, check_params
from metalearn.core.types import Examples, Forward, Loss, Params, check_tensors, named_leaves
from metalearn.inner.batching import differentiable_layers, over_tasks
from metalearn.inner.diagnostics import check_no_inplace_writes, explain_torch_errors
from metalearn.inner.meta_tensors import split_meta, taken_by, with_meta
from metalearn.models.kernels import kernels_support


class TaskLosses(NamedTuple):
    """Losses ``[T]`` and predictions, each tensor ``[T, examples, ...]``, of T tasks."""

    losses: Tensor
    predictions: Examples


def task_losses(forward: Forward, fast: Params, x: Examples, y: Examples, *, loss: Loss) -> TaskLosses:
    """Compute the loss of every task under its own parameters ``fast``, for inputs and targets ``[T, examples, ...]``.

    Raises:
        TypeError: if ``forward`` or ``loss`` does not return a tensor.
        ValueError: if ``loss`` returns more than one number for a task, or if the model changes an input or a parameter
            in place.
    """
    model, meta = split_meta(fast)
    to_model, to_loss = taken_by(forward, meta), taken_by(loss, meta)

    def one_task(
        params: Params, x: Examples, y: Examples, to_model: Params, to_loss: Params
    ) -> tuple[Tensor, Examples]:
        prediction = forward(params, x, **to_model)
        check_tensors(named_leaves("forward's prediction", prediction))
        return loss_of(prediction, y, to_loss), prediction

    def loss_of(prediction: Examples, y: Examples, to_loss: Params) -> Tensor:
        _check_shapes(loss, prediction, y)
        value = loss(prediction, y, **to_loss)
        check_tensors({"the loss": value})
        return value

    with check_no_inplace_writes(_named_tensors(fast, x, y)):
        if not to_model and (predictions := _batched_predictions(forward, model, x)) is not None:
            losses = over_tasks(loss_of, predictions, y, to_loss, model=forward, loss=loss)
        else:
            losses, predictions = over_tasks(one_task, model, x, y, to_model, to_loss, model=forward, loss=loss)
    if losses.ndim != 1:
        raise ValueError(
            f"loss: it gave {tuple(losses.shape[1:])} numbers for a task and must give one, the mean over the task's "
            "examples (reduction='mean')."
        )
    return TaskLosses(losses, predictions)


_ELEMENTWISE = {
    functional.mse_loss: nn.MSELoss,
    functional.l1_loss: nn.L1Loss,
    functional.smooth_l1_loss: nn.SmoothL1Loss,
    functional.huber_loss: nn.HuberLoss,
}


def _check_shapes(loss: Loss, prediction: Examples, y: Examples) -> None:
    """Check, for torch's losses, that targets have the predictions' shape, and that cross-entropy has two outputs."""
    if isinstance(loss, OuterLoss):
        loss = loss.support
    if not (isinstance(prediction, Tensor) and isinstance(y, Tensor)):
        return
    name = getattr(loss, "__name__", type(loss).__name__)
    is_elementwise = any(loss is function or isinstance(loss, module) for function, module in _ELEMENTWISE.items())
    if is_elementwise and prediction.shape != y.shape:
        raise ValueError(
            f"{name}: a task's predictions are {list(prediction.shape)} and its targets {list(y.shape)}, so "
            "that every prediction would be compared with other targets too. Give targets of the predictions' shape."
        )
    is_cross_entropy = loss is functional.cross_entropy or isinstance(loss, nn.CrossEntropyLoss)
    if is_cross_entropy and prediction.ndim > 1 and prediction.shape[1] == 1:
        raise ValueError(
            f"{name}: a task's predictions are {list(prediction.shape)}, and for one output it is always 0. "
            "For targets that are numbers give loss=mse_loss, for two classes two outputs."
        )


def _batched_predictions(forward: Forward, fast: Params, x: Examples) -> Examples | None:
    """Return every task's predictions without ``vmap``; ``None`` unless the model and the kernels support it."""
    batched: Callable[[Params, Tensor], Examples | None] | None = getattr(forward, "batched_forward", None)
    if not (batched and isinstance(x, Tensor) and x.ndim == 5 and kernels_support(fast, x)):
        return None
    with differentiable_layers():
        return batched(fast, x)


def task_predictions(forward: Forward, fast: Params, x: Examples) -> Examples:
    """Return every task's predictions ``[T, examples, ...]``, as ``task_losses`` computes them; differentiable."""
    model, meta = split_meta(fast)
    with check_no_inplace_writes(_named_tensors(fast, x)):
        if taken_by(forward, meta) or (predictions := _batched_predictions(forward, model, x)) is None:
            predictions = forward_over_tasks(forward, fast, x)
    return predictions


def forward_over_tasks(forward: Forward, fast: Params, x: Examples) -> Any:
    """Call the model for every task, ``[T, ...]``, with its own parameters and what else it takes by name."""
    model, meta = split_meta(fast)

    def one_task(params: Params, x: Examples, more: Params) -> Any:
        prediction = forward(params, x, **more)
        named_leaves("prediction", prediction)  # torch gets to know a dataclass
        return prediction

    return over_tasks(one_task, model, x, taken_by(forward, meta), model=forward)


def predict(forward: Forward, fast: Params, x: Examples, *, meta: Params | None = None) -> Any:
    """Predict for inputs ``x`` ``[T, examples, ...]`` of T tasks, each under its own parameters ``[T, ...]``.

    ``meta`` has the meta-learned tensors that the model takes by name; others are left out.
    """
    check_forward(forward)
    check_param_dict(fast)
    if meta:
        check_params(meta, name="meta")
    inputs = named_leaves("x", x)
    check_tensors({**inputs, **_named_tensors(fast)})
    tasks = {len(w) for w in fast.values() if w.ndim}
    for name, part in inputs.items():
        if len(tasks) == 1 and part.ndim and len(part) not in tasks:
            raise ValueError(
                f"predict: {name} is {list(part.shape)}, the examples of {len(part)} tasks, and the parameters are of "
                f"{tasks.pop()}. It must be [tasks, examples, ...]; of one task it is x[None]."
            )
    with explain_torch_errors(inputs, fast), check_no_inplace_writes(_named_tensors(fast, x)):
        return forward_over_tasks(forward, with_meta(fast, taken_by(forward, meta)), x)


def _named_tensors(fast: Params, *examples: Examples) -> dict[str, Tensor]:
    """Return tensors by their names in error messages."""
    named = {f"parameter '{name}'": w for name, w in fast.items()}
    for name, part in zip(("the inputs x", "the targets y"), examples, strict=False):
        named |= named_leaves(name, part)
    return named


@dataclass(frozen=True, eq=False)
class OuterLoss:
    """A loss for the support set, and another one for the query set."""

    support: Loss
    query: Loss

    @property
    def signature_of(self) -> Loss:
        """The function that a call calls."""
        return self.support

    def __call__(self, prediction: Examples, y: Examples, **more: Tensor) -> Tensor:
        """Return the loss of the support set."""
        return self.support(prediction, y, **more)


def query_loss(loss: Loss) -> Loss:
    """Return the loss for the query set."""
    return loss.query if isinstance(loss, OuterLoss) else loss


def total_support_loss(forward: Forward, fast: Params, x: Examples, y: Examples, *, loss: Loss) -> Tensor:
    """Return the sum of the support losses: its gradient is each task's, its Hessian block-diagonal over tasks."""
    return task_losses(forward, fast, x, y, loss=loss).losses.sum()
