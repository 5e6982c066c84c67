"""One meta-step: compute the meta-gradient and the metrics without side effects, then apply it.

g = 1/T sum_t d L_query,t(adapt_t(theta)) / d theta,    theta <- Adam(theta, g)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from metalearn.core.errors import NonFiniteError, RemoteNonFiniteError
from metalearn.core.types import Episodes, MetaGradient, Params
from metalearn.inner.diagnostics import defer_loss_checks
from metalearn.training.experiment import Experiment
from metalearn.training.failures import locate_nonfinite_gradient
from metalearn.training.runtime.distributed import DistributedContext
from metalearn.training.state import TrainState


class MetaUpdate(NamedTuple):
    """Mean meta-gradient and metrics of a batch's tasks in all processes, and whether any process was asked to stop."""

    grads: Params
    metrics: dict[str, Tensor]
    stop_requested: bool


def local_tasks(experiment: Experiment, iteration: int, ranks: DistributedContext) -> Episodes:
    """Sample this process's tasks of a batch; a pure function of seed, meta-step and rank."""
    meta_batch = experiment.config.task.meta_batch
    shard = ranks.shard(meta_batch)
    return experiment.train.tasks(iteration * meta_batch + shard.start, len(shard))


def compute_meta_update(
    experiment: Experiment,
    state: TrainState,
    episodes: Episodes,
    ranks: DistributedContext,
    *,
    stop_requested: bool = False,
) -> MetaUpdate:
    """Return the meta-gradient and metrics of a batch, averaged over all processes.

    On a GPU the CPU waits once a meta-step, here: whether losses and gradient are finite is read before the optimizer's
    step, which could not be undone. (Several processes wait for their all-reduce as well.) The metrics stay on the
    device until the meter reads a window of them.

    Raises:
        NonFiniteError: if a loss or a gradient is NaN or infinite; ``task`` counts in the whole batch, and is known
            only in the process that has it.
        LostRankError: if a process is gone.
    """
    # Adapt to this process's tasks and differentiate their query losses.
    local = _local_gradient(experiment, state.params, episodes, state.iteration)

    # Reduce: the means over all processes; flags count the processes that failed, and those asked to stop.
    flags = torch.stack([local.failed, torch.full_like(local.failed, float(stop_requested))])
    grads, metrics = local.grads, dict(local.metrics)
    meta_batch = experiment.config.task.meta_batch
    if ranks.size > 1:
        weight = episodes.tasks / meta_batch
        values = [*grads.values(), *metrics.values()]
        *means, flags = ranks.all_reduce_sum([*(weight * v for v in values), flags])
        grads = dict(zip(grads, means, strict=False))
        metrics = dict(zip(metrics, means[len(grads) :], strict=True))
    metrics["grad_norm"] = norm = get_total_norm(grads.values())

    # Check that all of it is finite, with one read-back.
    loss_failed, stop_requested, norm_failed = torch.stack([*(flags > 0), ~torch.isfinite(norm)]).tolist()
    if loss_failed or norm_failed:
        if loss_failed:
            error = _diagnose(local, experiment, state, episodes)
        else:
            error = locate_nonfinite_gradient(experiment, state, episodes, local.grads, single_process=ranks.size == 1)
        error = error.with_task_offset(ranks.shard(meta_batch).start)
        error.stop_requested = stop_requested
        raise error
    return MetaUpdate(grads, metrics, stop_requested)


def apply_meta_update(state: TrainState, update: MetaUpdate, *, clip_norm: float | None) -> None:
    """Clip the meta-gradient and take the optimizer's step (``state.build_meta_optimizer`` chooses the optimizer)."""
    state.is_consistent = False
    for group in state.optimizer.param_groups:
        group["lr"] = state.lr
    for name, p in state.params.items():
        p.grad = update.grads[name]
    clip_grads_with_norm_(state.params.values(), clip_norm or math.inf, update.metrics["grad_norm"])
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.iteration += 1
    state.consecutive_skips = 0
    state.is_consistent = True


class _LocalGradient(NamedTuple):
    """Means over this process's tasks; ``failed`` is 1 on the device if a loss or gradient is not finite, else 0."""

    grads: Params
    metrics: dict[str, Tensor]
    failed: Tensor
    error: NonFiniteError | None = None


def _metrics(experiment: Experiment) -> dict[str, Callable[[MetaGradient, Episodes], Tensor]]:
    """Return the training metrics by name; ``training_tag`` gives their tags. To add one, add a line."""
    metric = experiment.metric
    metrics: dict[str, Callable[[MetaGradient, Episodes], Tensor]] = {
        "query_loss": lambda result, episodes: result.loss,
        f"query_{metric.name}": lambda result, episodes: metric.per_task(result.predictions, episodes.query_y).mean(),
    }
    if experiment.inner.steps > 0:
        metrics["support_loss"] = lambda result, episodes: result.support_loss[0]
    for name in experiment.algorithm.diagnostics:
        metrics[name] = lambda result, episodes, name=name: result.diagnostics[name]  # type: ignore[misc]
    return metrics


def defers_loss_checks(device: torch.device) -> bool:
    """Return whether finite checks wait for the end of the meta-step; on GPUs each check forces a sync."""
    return device.type == "cuda"


def _local_gradient(experiment: Experiment, params: Params, episodes: Episodes, iteration: int) -> _LocalGradient:
    """Return the mean over this process's tasks; zeros, for the other processes to add to, if it is not finite."""
    deferred, zero = defers_loss_checks(experiment.device), next(iter(params.values())).new_zeros(())
    try:
        with defer_loss_checks() if deferred else nullcontext():
            result = experiment.meta_gradient(params, episodes, iteration)
    except NonFiniteError as error:
        grads = {name: torch.zeros_like(p) for name, p in params.items()}
        return _LocalGradient(grads, dict.fromkeys(_metrics(experiment), zero), zero + 1, error)
    metrics = {name: compute(result, episodes) for name, compute in _metrics(experiment).items()}
    if not deferred:
        return _LocalGradient(result.grads, metrics, zero)
    is_finite = torch.isfinite(result.loss) & torch.isfinite(result.support_loss).all()  # means of all tasks' losses
    return _LocalGradient(result.grads, metrics, (~is_finite).to(zero.dtype))


def _diagnose(local: _LocalGradient, experiment: Experiment, state: TrainState, episodes: Episodes) -> NonFiniteError:
    """Return which loss is not finite; after a deferred check, by computing again, with other dropout masks if any."""
    if local.error:
        return local.error
    if not local.failed:
        return RemoteNonFiniteError()
    try:
        experiment.meta_gradient_eager(state.params, episodes, state.iteration)
    except NonFiniteError as error:
        return error
    return NonFiniteError(
        "a mean of the tasks' losses was NaN or infinite, and no task's own is when it is computed again: their sum "
        "overflows, or it came of random draws in the model. Take a smaller inner.lr or fewer inner.steps."
    )
