"""K steps of gradient descent on every task's support loss at once:

    theta_0 = theta,    theta_{k+1} = theta_k - lr * dL_support(theta_k) / dtheta_k

(Finn, Abbeel & Levine 2017, arXiv 1703.03400, eq. 1.) The fast weights of T tasks are stacked along dimension 0.
The total support loss is a sum over tasks whose parameters are disjoint, so one ``autograd.grad`` of the total is
every task's own gradient. ``vmap`` is applied to the forward pass alone, so ``create_graph`` stays in sight.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from metalearn.inner.refusals import explained, refuse_nonfinite, unchanged
from metalearn.kernels import kernels_take, stacked_layers
from metalearn.params import check_dictionary, check_params, gradients, stack
from metalearn.types import Forward, Loss, Params, check_examples, check_tensors


@dataclass(frozen=True)
class InnerLoop:
    """Settings of the inner loop.

    Args:
        lr: step size of the inner gradient descent, positive.
        steps: K, the number of inner steps, at least 0.
        second_order: whether the meta-gradient goes through the inner gradients (MAML) or takes them as
            constants (first-order MAML).
        engine: how the meta-gradient is computed, one of ``metalearn.metagrad.ENGINES``.
        task_chunk: at most this many tasks are held in memory at a time; ``None`` takes all at once.
        snapshot_every: the engines ``checkpoint`` and ``adjoint`` keep the fast weights of every s-th step and
            compute those between again, in one more first-order step each; 1 keeps all.

    Raises:
        ValueError: if a setting is out of range, or of another type.
    """

    lr: float
    steps: int
    second_order: bool = True
    engine: str = "unroll"
    task_chunk: int | None = None
    snapshot_every: int = 1

    def __post_init__(self) -> None:
        lr = _as_float(self.lr)
        if not (math.isfinite(lr) and lr > 0):
            raise ValueError(f"InnerLoop: lr={self.lr!r}; it must be a positive number.")
        if not isinstance(self.second_order, bool):
            raise ValueError(f"InnerLoop: second_order={self.second_order!r}; it must be True or False.")
        if not isinstance(self.engine, str):
            raise ValueError(f"InnerLoop: engine={self.engine!r}; it must be a name, as in engine='unroll'.")
        if not _is_whole(self.steps) or self.steps < 0:
            raise ValueError(f"InnerLoop: steps={self.steps!r}; it must be a whole number, 0 or more.")
        if self.task_chunk is not None and (not _is_whole(self.task_chunk) or self.task_chunk < 1):
            raise ValueError(
                f"InnerLoop: task_chunk={self.task_chunk!r}; it must be at least 1, or None for all tasks."
            )
        if not _is_whole(self.snapshot_every) or self.snapshot_every < 1:
            raise ValueError(
                f"InnerLoop: snapshot_every={self.snapshot_every!r}; it must be a whole number, 1 or more."
            )
        object.__setattr__(self, "lr", lr)  # numpy's numbers and fractions do not multiply or split tensors
        for name in ("steps", "task_chunk", "snapshot_every"):
            value = getattr(self, name)
            object.__setattr__(self, name, value if value is None else int(value))


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _as_float(value: object) -> float:
    """NaN for what is no number, infinity for one too large."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


class TaskLosses(NamedTuple):
    """Losses ``[T]`` and predictions ``[T, examples, ...]`` of T tasks."""

    losses: Tensor
    predictions: Tensor


def task_losses(forward: Forward, fast: Params, x: Tensor, y: Tensor, *, loss: Loss) -> TaskLosses:
    """Every task's loss under its own parameters.

    Args:
        forward: one task's model.
        fast: stacked parameters, each ``[T, ...]``.
        x: inputs ``[T, examples, ...]``.
        y: targets ``[T, examples, ...]``.
        loss: one task's mean loss.

    Raises:
        TypeError: if ``forward`` or ``loss`` gives something other than a tensor.
        ValueError: if ``loss`` gives more than one number for a task, or if the model cannot be batched or changes a
            parameter in place.
    """

    def one_task(params: Params, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        prediction = forward(params, x)
        check_tensors({"forward's prediction": prediction})
        return loss_of(prediction, y), prediction

    def loss_of(prediction: Tensor, y: Tensor) -> Tensor:
        value = loss(prediction, y)
        check_tensors({"the loss": value})
        return value

    # randomness="different": dropout draws its own mask for every task. MATH: attention by its formula, as the fused
    # kernels (flash, efficient) have no second derivative, and on CPUs no batching rule.
    with unchanged(_called(fast, x, y)), sdpa_kernel(SDPBackend.MATH), stacked_layers():
        if (predictions := _at_once(forward, fast, x)) is not None:
            losses = torch.vmap(loss_of, randomness="different")(predictions, y)
        else:
            losses, predictions = torch.vmap(one_task, randomness="different")(fast, x, y)
    if losses.ndim != 1:
        raise ValueError(
            f"loss: it gave {tuple(losses.shape[1:])} numbers for a task and must give one, the mean over the task's "
            "examples (reduction='mean')."
        )
    return TaskLosses(losses, predictions)


def _at_once(forward: Forward, fast: Params, x: Tensor) -> Tensor | None:
    """Every task's predictions without ``vmap``, where the model offers them and the kernels take its tensors."""
    of_tasks: Callable[[Params, Tensor], Tensor | None] | None = getattr(forward, "of_tasks", None)
    return of_tasks(fast, x) if of_tasks and x.ndim == 5 and kernels_take(fast, x) else None


def predict(forward: Forward, fast: Params, x: Tensor) -> Tensor:
    """Every task's predictions ``[T, examples, ...]`` under its own parameters, for ``x`` ``[T, examples, ...]``."""
    check_dictionary(fast)
    check_tensors({"x": x, **_called(fast)})
    with explained({"x": x}, fast), unchanged(_called(fast, x)), sdpa_kernel(SDPBackend.MATH), stacked_layers():
        predictions: Tensor = torch.vmap(forward, randomness="different")(fast, x)
    return predictions


def _called(fast: Params, *examples: Tensor) -> dict[str, Tensor]:
    """Tensors by what an error calls them."""
    named = {f"parameter '{name}'": w for name, w in fast.items()}
    return named | dict(zip(("the inputs x", "the targets y"), examples, strict=False))


def total_support_loss(forward: Forward, fast: Params, x: Tensor, y: Tensor, *, loss: Loss) -> Tensor:
    """Sum of the tasks' support losses: its gradient is every task's own, its Hessian a block for every task."""
    return task_losses(forward, fast, x, y, loss=loss).losses.sum()


def inner_step(
    forward: Forward, fast: Params, support_x: Tensor, support_y: Tensor, inner: InnerLoop, *, loss: Loss
) -> tuple[Params, Tensor]:
    """One gradient step of every task.

    The result is differentiable through ``fast`` if that is (and gradients are enabled); if ``inner.second_order``
    is set, through the gradient as well.

    Returns:
        ``(fast, losses)``: the new fast weights, and the support losses ``[T]`` before the step, detached.

    Raises:
        ValueError: if the support loss depends on no parameter.
    """
    differentiable = torch.is_grad_enabled() and any(w.requires_grad for w in fast.values())
    with torch.enable_grad():
        at = {n: w if differentiable and w.requires_grad else w.detach().requires_grad_() for n, w in fast.items()}
        losses, _ = task_losses(forward, at, support_x, support_y, loss=loss)
        grads = gradients(losses.sum(), at, create_graph=inner.second_order and differentiable)
    return {name: w - inner.lr * grads[name] for name, w in fast.items()}, losses.detach()


def adapt(
    forward: Forward,
    params: Params,
    support_x: Tensor,
    support_y: Tensor,
    inner: InnerLoop,
    *,
    loss: Loss = cross_entropy,
) -> Params:
    """Adapt the meta-parameters to T tasks.

    Args:
        forward: pure model of one task, from ``functionalize``.
        params: meta-parameters theta, each ``[...]``.
        support_x: ``[T, S, ...]``.
        support_y: ``[T, S, ...]``; int64 labels for the default loss.
        inner: step size, number of steps, and whether the result is differentiable through the inner gradients.
        loss: ``loss(prediction, target)``, the mean over one task's examples.

    Returns:
        Fast weights, each ``[T, ...]``. They carry a graph back to ``params`` if those require a gradient and
        gradients are enabled; otherwise none, and no memory is spent on one.

    Raises:
        ValueError: if the support set's tensors do not lead with the same numbers of tasks and examples, or if the
            support loss depends on no parameter.
        TypeError: if a parameter is not a floating-point tensor.
        NonFiniteLossError: if a support loss is NaN or infinite.

    Example:
        >>> forward, theta = functionalize(nn.Linear(3, 2))
        >>> fast = adapt(forward, theta, torch.randn(8, 4, 3), torch.zeros(8, 4).long(), InnerLoop(lr=0.1, steps=2))
        >>> fast["weight"].shape
        torch.Size([8, 2, 3])
    """
    check_params(params)
    check_examples("support", support_x, support_y)
    support_losses = []
    with explained({"support_x": support_x, "support_y": support_y}, params):
        fast = stack(params, support_x.shape[0])
        for _ in range(inner.steps):
            fast, losses = inner_step(forward, fast, support_x, support_y, inner, loss=loss)
            support_losses.append(losses)
        refuse_nonfinite(support_losses)
    return fast
