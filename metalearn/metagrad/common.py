"""Shared by the engines: the forward pass without graphs, the query gradient that starts the backward pass, results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from metalearn.core.params import grad_of, vjp
from metalearn.core.threads import one_thread_at_a_time
from metalearn.core.types import Episodes, Examples, Forward, Loss, MetaGradient, Params
from metalearn.inner import (
    InnerLoop,
    InnerState,
    TaskLosses,
    check_losses_finite,
    init_state,
    inner_step,
    params_at_step,
    query_loss,
    task_losses,
)
from metalearn.metagrad.trajectory import StepCheckpoint, Trajectory


@dataclass(eq=False)
class ForwardPass:
    """K inner steps taken without graphs, and the adjoint at their end; raises if a loss is NaN or infinite.

    ``query`` has the query losses of the objective, ``[T]``, and predictions at theta_K; the backward pass adds the
    losses before the last step. ``lam`` is lam_K, d(mean objective) / d state_K; 0 where the query loss does not reach.
    """

    forward: Forward
    params: Params
    episodes: Episodes
    inner: InnerLoop
    loss: Loss
    trajectory: Trajectory  # without checkpoints when every step's Jacobian is the identity
    final_state: InitVar[InnerState]
    query: TaskLosses = field(init=False)
    lam: Params = field(init=False)

    def __post_init__(self, final_state: InnerState) -> None:
        self.query, self.lam = self.query_gradient(final_state, self.inner.steps)
        check_losses_finite(self.trajectory.support_losses, self.query.losses)

    def query_gradient(self, state: InnerState, k: int) -> tuple[TaskLosses, Params]:
        """Return w_k times the query losses after k steps, the predictions, and the mean's gradient in the state.

        The activations are freed before this returns.
        """
        weight = self.inner.query_loss_weights[k]
        with torch.enable_grad():
            at = {name: w.detach().requires_grad_() for name, w in state.items()}
            fast = params_at_step(at, self.inner, k)
            query = self.episodes.query_x, self.episodes.query_y
            losses, predictions = task_losses(self.forward, fast, *query, loss=query_loss(self.loss))
            lam = grad_of(weight * losses.mean(), at, create_graph=False)
        return TaskLosses(weight * losses.detach(), tree_map(Tensor.detach, predictions)), lam

    def add_query_gradient(self, checkpoint: StepCheckpoint, lam: Params) -> Params:
        """Add the gradient of the query loss before a step to the adjoint, if the objective has a weight for it."""
        if not self.inner.query_loss_weights[checkpoint.step]:
            return lam
        with checkpoint.replay_rng():
            query, gradient = self.query_gradient(checkpoint.state, checkpoint.step)
        check_losses_finite([], query.losses)
        self.query = TaskLosses(self.query.losses + query.losses, self.query.predictions)
        return {name: lam[name] + gradient[name] for name in lam}

    def result(self, lam: Params, recomputed: Mapping[int, Tensor] | None = None) -> MetaGradient:
        """Return the meta-gradient from lam_0, the adjoint before the first step.

        All tasks share theta, so that their adjoints ``[T, ...]`` add up to ``[...]``. ``recomputed`` has the total
        support losses of the backward pass, by step; they are compared with those of the forward pass.
        """
        mark = self.trajectory.check_recomputation(recomputed or {})
        query_losses = self.query.losses if mark is None else self.query.losses + mark
        support = self.episodes.support_x, self.episodes.support_y
        with torch.enable_grad():
            theta = {name: p.detach().requires_grad_() for name, p in self.params.items()}
            grads = vjp(init_state(self.forward, theta, *support, self.inner), theta, lam)
        return build_result(grads, query_losses, self.query.predictions, self.trajectory.support_losses)


def run_forward(forward: Forward, params: Params, episodes: Episodes, inner: InnerLoop, loss: Loss) -> ForwardPass:
    """Take K inner steps without graphs, and compute the query loss.

    No checkpoint is kept where every step's Jacobian is the identity: in first order, if a step is plain and the
    objective is the last query loss.
    """
    is_identity = not inner.second_order and inner.is_plain_sgd and not any(inner.query_loss_weights[:-1])
    checkpoint_every = None if is_identity else inner.checkpoint_every
    state, trajectory = take_inner_steps(forward, params, episodes, inner, loss, checkpoint_every=checkpoint_every)
    return ForwardPass(forward, params, episodes, inner, loss, trajectory, state)


def take_inner_steps(
    forward: Forward, params: Params, episodes: Episodes, inner: InnerLoop, loss: Loss, *, checkpoint_every: int | None
) -> tuple[InnerState, Trajectory]:
    """Take K inner steps without graphs; return the state after the last, and the trajectory.

    Every s-th step's beginning is kept, s = ``checkpoint_every``; ``None`` keeps none, for no backward pass.
    """

    def step_fn(k: int, state: InnerState) -> tuple[InnerState, Tensor]:
        return inner_step(forward, state, episodes.support_x, episodes.support_y, inner, loss=loss, k=k)

    theta = {name: p.detach() for name, p in params.items()}
    with torch.no_grad():
        state = init_state(forward, theta, episodes.support_x, episodes.support_y, inner)
    checkpoints, support_losses = [], []
    with one_thread_at_a_time():  # whose random numbers are drawn again from a checkpoint
        for k in range(inner.steps):
            if checkpoint_every is not None and k % checkpoint_every == 0:
                checkpoints.append(StepCheckpoint.of(k, state))
            state, losses = step_fn(k, state)
            support_losses.append(losses)
    return state, Trajectory(step_fn, inner.steps, checkpoint_every or 1, checkpoints, support_losses)


def build_result(grads: Params, losses: Tensor, predictions: Examples, support_losses: list[Tensor]) -> MetaGradient:
    """Build an engine's result from the objective of each task ``[T]``, and the support losses ``[T]`` of each step."""
    losses = losses.detach()
    return MetaGradient(
        loss=losses.mean(),
        grads=grads,
        predictions=tree_map(Tensor.detach, predictions),
        support_loss=torch.stack([s.mean() for s in support_losses]) if support_losses else losses.new_empty(0),
    )


def check_unsupported_settings(engine: str, name: str, inner: InnerLoop, reasons: Mapping[str, str]) -> None:
    """Raise a ``ValueError`` for the first setting in use that an engine cannot differentiate, for the given reason."""
    for setting, reason in reasons.items():
        if value := getattr(inner, setting):
            raise ValueError(f"{engine}: inner.{setting}={value!r}, which {name} has no gradient for: {reason}.")
