"""A meta-gradient that is NaN or infinite though every loss is finite: in which parameter, task and inner step."""

from __future__ import annotations

from collections.abc import Callable

from metalearn.core.errors import NonFiniteGradientError
from metalearn.core.types import Episodes, Forward, Loss, MetaGradient, Params
from metalearn.derivatives.singular import first_nonfinite, is_finite
from metalearn.inner import InnerLoop
from metalearn.metagrad.adjoint import adjoint


def check_finite_gradient(
    grads: Params,
    of_task: Callable[[Episodes], MetaGradient],
    step_of: Callable[[Episodes], int | None],
    tasks: Episodes,
) -> None:
    """Refuse a meta-gradient that is not finite: one reduction, and where that fails one meta-gradient a task.

    Args:
        grads: the meta-gradient.
        of_task: computes that of one task.
        step_of: finds the inner step whose adjoint is not finite, of one task.
        tasks: all of them.

    Raises:
        NonFiniteGradientError: naming the parameter, and task and inner step if one task's own is not finite.
    """
    if is_finite(grads):
        return
    for task, episode in enumerate(tasks.split(1)):
        if fault := first_nonfinite(of_task(episode).grads):
            raise NonFiniteGradientError(fault[0], value=fault[1], task=task, step=step_of(episode))
    if fault := first_nonfinite(grads):
        raise NonFiniteGradientError(fault[0], value=fault[1])


def last_nonfinite_step(
    forward: Forward, params: Params, episode: Episodes, inner: InnerLoop, loss: Loss
) -> int | None:
    """Return the last inner step whose adjoint is not finite; ``None`` if it is finite or cannot be computed."""
    steps: list[int] = []

    def watch(k: int, lam: Params) -> None:
        if not is_finite(lam):
            steps.append(k)

    try:
        adjoint(forward, params, episode, inner, loss, watch=watch)
    except (ArithmeticError, ValueError, RuntimeError):  # of a model that goes through another engine only
        return None
    return max(steps, default=None)
