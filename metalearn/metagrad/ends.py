"""What engines share: the way to the query loss without graphs, where the adjoint starts, and the result."""

from __future__ import annotations

import torch
from torch import Tensor

from metalearn.inner import InnerLoop, TaskLosses, inner_step, refuse_nonfinite, task_losses
from metalearn.metagrad.trajectory import Trajectory, walk
from metalearn.params import gradients, stack
from metalearn.types import Episodes, Forward, Loss, MetaGradient, Params


def query_pass(forward: Forward, fast: Params, episodes: Episodes, loss: Loss) -> tuple[TaskLosses, Params]:
    """The query losses and predictions at theta_K, detached, and lam_K = d(mean query loss) / d theta_K.

    Its activations are freed before this returns.
    """
    with torch.enable_grad():
        at = {name: w.detach().requires_grad_() for name, w in fast.items()}
        losses, predictions = task_losses(forward, at, episodes.query_x, episodes.query_y, loss=loss)
        lam = gradients(losses.mean(), at, create_graph=False)
    return TaskLosses(losses.detach(), predictions.detach()), lam


def way_there(
    forward: Forward, params: Params, episodes: Episodes, inner: InnerLoop, loss: Loss
) -> tuple[TaskLosses, Params, Trajectory]:
    """K inner steps without graphs and the query pass: query losses and predictions, lam_K, and the way back.

    Nothing is kept for the way back in first order, where it has no steps.

    Raises:
        NonFiniteLossError: if a loss is NaN or infinite.
    """

    def step(fast: Params) -> tuple[Params, Tensor]:
        return inner_step(forward, fast, episodes.support_x, episodes.support_y, inner, loss=loss)

    theta = {name: p.detach() for name, p in params.items()}
    every = inner.snapshot_every if inner.second_order else None
    fast, trajectory = walk(step, stack(theta, episodes.tasks), steps=inner.steps, every=every)
    query, lam = query_pass(forward, fast, episodes, loss)
    refuse_nonfinite(trajectory.support_losses, query.losses)
    return query, lam, trajectory


def outcome(grads: Params, query: TaskLosses, support_losses: list[Tensor]) -> MetaGradient:
    """What every engine returns, from gradients, query losses and predictions, and each step's support losses."""
    losses, predictions = query.losses.detach(), query.predictions.detach()
    return MetaGradient(
        loss=losses.mean(),
        grads=grads,
        predictions=predictions,
        support_loss=torch.stack([s.mean() for s in support_losses]) if support_losses else losses.new_empty(0),
    )


def sum_over_tasks(lam: Params) -> Params:
    """The transpose of ``stack``: theta is shared by all tasks, so their adjoints ``[T, ...]`` add up to ``[...]``."""
    return {name: w.sum(dim=0) for name, w in lam.items()}
