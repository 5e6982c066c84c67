"""Second-order diagnostics of a training, on a few tasks of a batch.

cosine between the first-order meta-gradient, sum_t lam_K, and the second-order one, sum_t lam_0
|lam_k| at every inner step: how the adjoint grows or shrinks in the backward pass
the largest eigenvalue of d2 L_support: gradient descent with step lr overshoots along it where lr * it > 2
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

from metalearn.core.errors import NonFiniteError
from metalearn.core.params import expand_over_tasks
from metalearn.core.types import Episodes, Forward, Loss, Params
from metalearn.derivatives import top_eigenvalues
from metalearn.inner import InnerLoop, meta_params_at_step, total_support_loss, without_state
from metalearn.metagrad.adjoint import adjoint
from metalearn.metagrad.trajectory import StepCheckpoint
from metalearn.training.experiment import Experiment
from metalearn.training.state import TrainState, preserve_rng_state

log = logging.getLogger(__name__)

_NUM_TASKS = 2
_EIGENVALUE_TOLERANCE = 0.01


def has_curvature(experiment: Experiment) -> bool:
    """Return whether the training has a second-order term to look at, and ``log.curvature_every`` asks for it.

    Without inner steps (ProtoNet) there is none, and Reptile and iMAML have another meta-gradient.
    """
    has_adjoint = experiment.algorithm.engine is None and experiment.inner.steps > 0
    return has_adjoint and experiment.config.log.curvature_every is not None


def curvature_due(iteration: int, every: int | None) -> bool:
    """Return whether to look at the second-order term after ``iteration`` meta-steps: the first, and each ``every``."""
    return every is not None and (iteration == 1 or iteration % every == 0)


def second_order_metrics(experiment: Experiment, state: TrainState, episodes: Episodes) -> dict[str, float]:
    """Return the diagnostics that ``log.curvature_every`` and ``log.eigenvalue_every`` ask for now, by tag.

    They leave the training as it is: no random number of it is drawn, and a failure is a warning.
    """
    settings, inner, loss = experiment.config.log, experiment.inner, experiment.metric.loss
    metrics: dict[str, float] = {}
    try:
        if has_curvature(experiment) and curvature_due(state.iteration, settings.curvature_every):
            metrics |= curvature(experiment.forward, state.params, episodes, inner, loss=loss)
        if settings.eigenvalue_every and state.iteration % settings.eigenvalue_every == 0:
            params = meta_params_at_step(state.params, inner)
            metrics |= support_eigenvalue(experiment.forward, params, episodes, loss=loss)
    except NonFiniteError as error:
        log.warning("No second-order metrics at meta-step %d: %s", state.iteration, error)
    except (RuntimeError, ValueError) as error:  # first-order training needs neither the memory nor a second derivative
        _warn_once(f"{str(error).splitlines()[0].rstrip('.')}.")
    return metrics


@functools.cache
def _warn_once(reason: str) -> None:
    log.warning(
        "No second-order metrics: %s The training continues; log.curvature_every=null log.eigenvalue_every=null leave "
        "them out.",
        reason,
    )


def curvature(
    forward: Forward, params: Params, episodes: Episodes, inner: InnerLoop, *, loss: Loss = cross_entropy
) -> dict[str, float]:
    """Return cosine and norms by TensorBoard tag, from the batch's first tasks: two, or a task chunk.

    ``inner`` may be of either order: the diagnostics are of the second-order term that it has or lacks.
    """
    few = episodes.split(min(_NUM_TASKS, inner.task_chunk or _NUM_TASKS))[0]
    sums: dict[int, Tensor] = {}
    norms: dict[int, float] = {}

    def record(k: int, lam: Params) -> None:
        flat = torch.cat([w.flatten(1) for w in without_state(lam).values()], dim=1)
        per_task = few.tasks * flat  # lam is of the mean over tasks
        norms[k] = per_task.norm(dim=1).mean().item()
        if k in (0, inner.steps):
            sums[k] = per_task.sum(dim=0)

    second = dataclasses.replace(inner, second_order=True)
    with preserve_rng_state():
        exact = adjoint(forward, params, few, second, loss, callback=record, forward_mode=False)
    if inner.is_plain_sgd and inner.initializer is None:
        cosine = cosine_similarity(sums[inner.steps], sums[0], dim=0).item()
    else:  # lam_K is not the first order's gradient
        with preserve_rng_state():
            first = adjoint(forward, params, few, dataclasses.replace(inner, second_order=False), loss)
        flat_first, flat_exact = (
            torch.cat([g.flatten() for g in without_state(result.grads).values()]) for result in (first, exact)
        )
        cosine = cosine_similarity(flat_first, flat_exact, dim=0).item()
    return {
        "gradients/cosine_first_vs_second": cosine,
        **{f"gradients/adjoint_norm/step_{k}": norm for k, norm in sorted(norms.items())},
    }


def support_eigenvalue(
    forward: Forward, params: Params, episodes: Episodes, *, loss: Loss = cross_entropy
) -> dict[str, float]:
    """Return the largest Hessian eigenvalue of the first task's support loss by tag; NaN if Lanczos fails.

    It costs some twenty Hessian-vector products, ten times as much as ``curvature``.
    """
    x, y = episodes.support_x[:1], episodes.support_y[:1]
    theta = {name: p.detach() for name, p in params.items()}
    checkpoint = StepCheckpoint.of(0, theta)

    def f(theta: Params) -> Tensor:
        with checkpoint.replay_rng():  # one dropout mask, so that there is one Hessian
            return total_support_loss(forward, expand_over_tasks(theta, tasks=1), x, y, loss=loss)

    tag = "gradients/support_top_eigenvalue"
    try:
        with preserve_rng_state():
            return {tag: top_eigenvalues(f, theta, tol=_EIGENVALUE_TOLERANCE, mode="reverse_over_reverse").item()}
    except ArithmeticError as error:
        log.warning("%s: %s", tag, error)
        return {tag: math.nan}
