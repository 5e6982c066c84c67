"""One meta-step, in two halves: what a batch of tasks asks for, which changes nothing, and the optimiser's step.

g = 1/T sum_t d L_query,t(adapt_t(theta)) / d theta,    theta <- Adam(theta, g)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from metalearn.errors import NonFiniteElsewhereError, NonFiniteError, NonFiniteLossError
from metalearn.metagrad import meta_gradient
from metalearn.runs.distributed import Ranks
from metalearn.runs.evaluation import accuracy
from metalearn.runs.experiment import Experiment
from metalearn.runs.nonfinite import blame
from metalearn.runs.state import TrainState
from metalearn.types import Episodes, MetaGradient, Params


class Update(NamedTuple):
    """What a batch asks for.

    Args:
        grads: mean meta-gradient over all tasks of all processes, finite.
        figures: means over them: scalars on the device, by name.
        stop: whether any process was asked to end.
    """

    grads: Params
    figures: dict[str, Tensor]
    stop: bool


def own_tasks(experiment: Experiment, iteration: int, ranks: Ranks) -> Episodes:
    """This process's tasks of a batch, by their index: none of them is another's."""
    tasks = experiment.config.task.meta_batch
    share = ranks.share(tasks)
    return experiment.train.tasks(iteration * tasks + share.start, len(share))


def propose(
    experiment: Experiment, state: TrainState, episodes: Episodes, ranks: Ranks, *, stop: bool = False
) -> Update:
    """The meta-gradient of a batch; ``state`` stays as it is.

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
    failure: NonFiniteLossError | None = None
    try:
        own = _values(experiment, meta_gradient(experiment.forward, state.params, episodes, experiment.inner), episodes)
    except NonFiniteLossError as error:
        failure = error.in_batch(first)
        own = _nothing(experiment, state.params)
    grads, figures, failed, stopping = _mean(own, episodes.tasks / tasks, ranks, failure is not None, stop)
    fault: NonFiniteError | None = (failure or NonFiniteElsewhereError()) if failed else None
    figures["grad_norm"] = norm = get_total_norm(grads.values())
    if fault is None and not torch.isfinite(norm):
        fault = blame(experiment, state.params, episodes, own.grads, alone=ranks.size == 1).in_batch(first)
    if fault:
        fault.asked_to_end = stopping
        raise fault
    return Update(grads, figures, stopping)


class _Values(NamedTuple):
    grads: Params
    figures: dict[str, Tensor]


def _values(experiment: Experiment, result: MetaGradient, episodes: Episodes) -> _Values:
    figures = {"query_loss": result.loss, "query_accuracy": accuracy(result.predictions, episodes.query_y).mean()}
    if experiment.inner.steps > 0:
        figures["support_loss"] = result.support_loss[0]
    return _Values(result.grads, figures)


def _nothing(experiment: Experiment, params: Params) -> _Values:
    """Zeros, for the others to add."""
    zero = next(iter(params.values())).new_zeros(())
    names = ["query_loss", "query_accuracy", *(["support_loss"] if experiment.inner.steps > 0 else [])]
    return _Values({name: torch.zeros_like(p) for name, p in params.items()}, dict.fromkeys(names, zero))


def _mean(
    own: _Values, share: float, ranks: Ranks, failed: bool, stop: bool
) -> tuple[Params, dict[str, Tensor], bool, bool]:
    """The means over all processes, and whether one of them failed or was asked to end."""
    if ranks.size == 1:
        return own.grads, dict(own.figures), failed, stop
    values = [*own.grads.values(), *own.figures.values()]
    flags = values[0].new_tensor([failed, stop])
    *means, counts = ranks.sum([*(share * v for v in values), flags])
    grads = dict(zip(own.grads, means, strict=False))
    figures = dict(zip(own.figures, means[len(grads) :], strict=True))
    any_failed, any_stop = (counts > 0).tolist()
    return grads, figures, any_failed, any_stop


def take(state: TrainState, update: Update, *, clip_norm: float | None) -> None:
    """The optimiser's step."""
    state.whole = False
    for group in state.optimizer.param_groups:
        group["lr"] = state.lr
    for name, p in state.params.items():
        p.grad = update.grads[name]
    clip_grads_with_norm_(state.params.values(), clip_norm or math.inf, update.figures["grad_norm"])
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.iteration += 1
    state.skipped_in_a_row = 0
    state.whole = True
