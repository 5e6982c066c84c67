"""What the second-order term does in a training, seen on a few tasks of a batch.

cosine between the first-order meta-gradient, sum_t lam_K, and the second-order one, sum_t lam_0
|lam_k| at every inner step: how the adjoint grows or shrinks on its way back
the largest eigenvalue of d2 L_support: gradient descent with step lr overshoots along it where lr * it > 2
"""

from __future__ import annotations

import dataclasses
import logging
import math
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

from metalearn.core.functional import expand_over_tasks
from metalearn.core.types import Episodes, Forward, Loss, Params
from metalearn.derivatives import top_eigenvalues
from metalearn.inner import InnerLoop, total_support_loss, without_state
from metalearn.metagrad.adjoint import adjoint
from metalearn.metagrad.trajectory import Snapshot

log = logging.getLogger(__name__)

_TASKS = 4
_EIGENVALUE_TOLERANCE = 0.01


def curvature(
    forward: Forward, params: Params, episodes: Episodes, inner: InnerLoop, *, loss: Loss = cross_entropy
) -> dict[str, float]:
    """Cosine and norms by TensorBoard tag, from the batch's first tasks: four, or a task chunk.

    Args:
        forward: one task's model.
        params: meta-parameters.
        episodes: a batch of tasks.
        inner: the inner loop, in either order; what is shown is the second-order term that it has or lacks.
        loss: one task's mean loss.
    """
    few = episodes.split(min(_TASKS, inner.task_chunk or _TASKS))[0]
    sums: dict[int, Tensor] = {}
    norms: dict[int, float] = {}

    def watch(k: int, lam: Params) -> None:
        own = [w.flatten(1) for w in without_state(lam).values()]
        per_task = few.tasks * torch.cat(own, dim=1)  # lam is of the mean over tasks
        norms[k] = per_task.norm(dim=1).mean().item()
        if k in (0, inner.steps):
            sums[k] = per_task.sum(dim=0)

    second = dataclasses.replace(inner, second_order=True)
    with _draws_put_back(few):
        exact = adjoint(forward, params, few, second, loss, callback=watch)
    if inner.is_plain_sgd and inner.initializer is None:
        cosine = cosine_similarity(sums[inner.steps], sums[0], dim=0).item()
    else:  # lam_K is not the first order's gradient
        with _draws_put_back(few):
            first = adjoint(forward, params, few, dataclasses.replace(inner, second_order=False), loss)
        cosine = cosine_similarity(_flat(first.grads), _flat(exact.grads), dim=0).item()
    return {
        "grad/cosine_first_vs_second": cosine,
        **{f"grad/adjoint_norm/step_{k}": norm for k, norm in sorted(norms.items())},
    }


def _flat(grads: Params) -> Tensor:
    return torch.cat([g.flatten() for g in without_state(grads).values()])


def _draws_put_back(episodes: Episodes) -> AbstractContextManager[None]:
    """Looking must not move the run's random draws."""
    return torch.random.fork_rng(devices=[episodes.query_x.device] if episodes.query_x.is_cuda else [])


def support_eigenvalue(
    forward: Forward, params: Params, episodes: Episodes, *, loss: Loss = cross_entropy
) -> dict[str, float]:
    """Largest eigenvalue, by TensorBoard tag, of the first task's support loss at the meta-parameters; NaN where
    Lanczos fails. It costs some twenty Hessian-vector products, ten times as much as ``curvature``.
    """
    x, y = episodes.support_x[:1], episodes.support_y[:1]
    point = {name: p.detach() for name, p in params.items()}

    start = Snapshot.of(0, point)

    def f(theta: Params) -> Tensor:
        with start.replay_rng():  # one dropout mask, so that there is one Hessian
            return total_support_loss(forward, expand_over_tasks(theta, tasks=1), x, y, loss=loss)

    tag = "grad/support_top_eigenvalue"
    try:
        with _draws_put_back(episodes):
            return {tag: top_eigenvalues(f, point, tol=_EIGENVALUE_TOLERANCE, mode="reverse_over_reverse").item()}
    except ArithmeticError as error:
        log.warning("%s: %s", tag, error)
        return {tag: math.nan}
