"""One meta-step, in two halves: what a batch of tasks asks for, which changes nothing, and the optimiser's step.

g = 1/T sum_t d L_query,t(adapt_t(theta)) / d theta,    theta <- Adam(theta, g)
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from metalearn.core.errors import NonFiniteError, RemoteNonFiniteError
from metalearn.core.types import Episodes, Params
from metalearn.inner.diagnostics import defer_loss_checks
from metalearn.training.experiment import Experiment
from metalearn.training.failures import locate_nonfinite_gradient
from metalearn.training.runtime.distributed import DistributedContext
from metalearn.training.state import TrainState


class MetaUpdate(NamedTuple):
    """What a batch asks for.

    Args:
        grads: mean meta-gradient over all tasks of all processes, finite.
        metrics: means over them: scalars on the device, by name.
        stop: whether any process was asked to end.
    """

    grads: Params
    metrics: dict[str, Tensor]
    stop: bool


def local_tasks(experiment: Experiment, iteration: int, ranks: DistributedContext) -> Episodes:
    """This process's tasks of a batch, by their index: none of them is another's."""
    tasks = experiment.config.task.meta_batch
    share = ranks.share(tasks)
    return experiment.train.tasks(iteration * tasks + share.start, len(share))


def compute_update(
    experiment: Experiment, state: TrainState, episodes: Episodes, ranks: DistributedContext, *, stop: bool = False
) -> MetaUpdate:
    """The meta-gradient of a batch; ``state`` stays as it is.

    On a GPU the CPU waits once a meta-step, here: whether the losses and the gradient are finite is read back before
    the optimiser's step, which could not be taken back. (Several processes wait for their all-reduce as well, and the
    engines ``checkpoint`` and ``adjoint`` in second order for the comparison of their two passes.) The metrics stay on
    the device until the meter reads a window of them.

    Args:
        experiment: what to compute with.
        state: before the step.
        episodes: this process's tasks of the batch.
        ranks: the processes that share the batch.
        stop: whether this process was asked to end; told to the others with the gradient.

    Raises:
        NonFiniteError: if a loss or a gradient is NaN or infinite; ``task`` counts in the whole batch, and is known
            in the process that has it.
        LostProcessError: if a process is gone.
    """
    tasks = experiment.config.task.meta_batch
    first = ranks.share(tasks).start
    own = _own(experiment, state.params, episodes, state.iteration)
    grads, metrics, flags = _all_reduce_mean(own, episodes.tasks / tasks, ranks, stop)
    metrics["grad_norm"] = norm = get_total_norm(grads.values())
    failed, stopping, endless = torch.stack([*(flags > 0), ~torch.isfinite(norm)]).tolist()
    fault: NonFiniteError | None = None
    if failed:
        fault = _diagnose(own, experiment, state, episodes).with_task_offset(first)
    elif endless:
        fault = locate_nonfinite_gradient(
            experiment, state, episodes, own.grads, alone=ranks.size == 1
        ).with_task_offset(first)
    if fault:
        fault.stop_requested = stopping
        raise fault
    return MetaUpdate(grads, metrics, stopping)


class _LocalGradient(NamedTuple):
    """What this process's tasks ask for.

    Args:
        grads: their mean meta-gradient.
        metrics: their means, by name.
        failed: 1 where a loss of theirs, or its gradient, is not finite, else 0; a scalar on the device.
        failure: which, if that is known already.
    """

    grads: Params
    metrics: dict[str, Tensor]
    failed: Tensor
    failure: NonFiniteError | None = None


def defers_loss_checks(device: torch.device) -> bool:
    """Whether losses are looked at once a meta-step and not where they come about: reading has a GPU run dry."""
    return device.type == "cuda"


def _own(experiment: Experiment, params: Params, episodes: Episodes, iteration: int) -> _LocalGradient:
    """The mean over this process's tasks; zeros, for the others to add, where it was refused."""
    late, zero = defers_loss_checks(experiment.device), next(iter(params.values())).new_zeros(())
    try:
        with defer_loss_checks() if late else nullcontext():
            result = experiment.gradient(params, episodes, iteration)
    except NonFiniteError as error:
        metrics = dict.fromkeys(_metric_names(experiment), zero)
        return _LocalGradient({name: torch.zeros_like(p) for name, p in params.items()}, metrics, zero + 1, error)
    score = experiment.score.of(result.predictions, episodes.query_y).mean()
    own = [result.diagnostics[name] for name in experiment.algorithm.diagnostics]
    values = [result.loss, score, *result.support_loss[:1], *own]
    metrics = dict(zip(_metric_names(experiment), values, strict=True))
    if not late:
        return _LocalGradient(result.grads, metrics, zero)
    finite = torch.isfinite(result.loss) & torch.isfinite(result.support_loss).all()  # a mean is only if all of it are
    return _LocalGradient(result.grads, metrics, (~finite).to(zero.dtype))


def _metric_names(experiment: Experiment) -> list[str]:
    """Names of what is averaged over all tasks: the same in every process, also in one whose tasks have failed."""
    support = ["support_loss"] if experiment.inner.steps > 0 else []
    return ["query_loss", f"query_{experiment.score.name}", *support, *experiment.algorithm.diagnostics]


def _diagnose(own: _LocalGradient, experiment: Experiment, state: TrainState, episodes: Episodes) -> NonFiniteError:
    """Which loss it was; if it was looked at late, by computing all of it again, with another dropout if there is any.

    Its message is in the terms of this process's tasks.
    """
    if own.failure:
        return own.failure
    if not own.failed:
        return RemoteNonFiniteError()
    try:
        experiment.eager(state.params, episodes, state.iteration)
    except NonFiniteError as error:
        return error
    return NonFiniteError(
        "a mean of the tasks' losses was NaN or infinite, and no task's own is when it is computed again: their sum "
        "overflows, or it came of random draws in the model. Take a smaller inner.lr or fewer inner.steps."
    )


def _all_reduce_mean(
    own: _LocalGradient, share: float, ranks: DistributedContext, stop: bool
) -> tuple[Params, dict[str, Tensor], Tensor]:
    """The means over all processes, and how many of them failed and how many were asked to end, ``[2]``."""
    flags = torch.stack([own.failed, torch.full_like(own.failed, float(stop))])
    if ranks.size == 1:
        return own.grads, dict(own.metrics), flags
    values = [*own.grads.values(), *own.metrics.values()]
    *means, counts = ranks.sum([*(share * v for v in values), flags])
    grads = dict(zip(own.grads, means, strict=False))
    metrics = dict(zip(own.metrics, means[len(grads) :], strict=True))
    return grads, metrics, counts


def apply_update(state: TrainState, update: MetaUpdate, *, clip_norm: float | None) -> None:
    """The optimiser's step."""
    state.whole = False
    for group in state.optimizer.param_groups:
        group["lr"] = state.lr
    for name, p in state.params.items():
        p.grad = update.grads[name]
    clip_grads_with_norm_(state.params.values(), clip_norm or math.inf, update.metrics["grad_norm"])
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.iteration += 1
    state.consecutive_skips = 0
    state.whole = True
