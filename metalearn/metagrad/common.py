"""What engines share: the way to the query loss without graphs, where the adjoint starts, and the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from metalearn.core.functional import grad_of, vjp
from metalearn.core.types import Episodes, Forward, Loss, MetaGradient, Params
from metalearn.inner import (
    InnerLoop,
    TaskLosses,
    check_losses_finite,
    init_state,
    inner_step,
    params_at_step,
    task_losses,
)
from metalearn.metagrad.trajectory import Snapshot, Trajectory, rollout


@dataclass(eq=False)
class ForwardPass:
    """K inner steps that were taken without graphs, and the adjoint at their end.

    Args:
        forward, params, episodes, inner, loss: of the meta-gradient.
        trajectory: the way back; without steps where the adjoint passes every step as it is.
        query: query losses of the objective, ``[T]``, and predictions at theta_K; the losses before the last step are
            added on the way back.
        lam: lam_K, d(mean objective) / d carry_K; 0 for what the query loss does not reach.
    """

    forward: Forward
    params: Params
    episodes: Episodes
    inner: InnerLoop
    loss: Loss
    trajectory: Trajectory
    query: TaskLosses = field(init=False)
    lam: Params = field(init=False)

    def arrive(self, carry: Params) -> None:
        """Take the query loss after the last step.

        Raises:
            NonFiniteLossError: if a loss is NaN or infinite.
        """
        self.query, self.lam = self.query_gradient(carry, self.inner.steps)
        check_losses_finite(self.trajectory.support_losses, self.query.losses)

    def query_gradient(self, carry: Params, k: int) -> tuple[TaskLosses, Params]:
        """w_k times the query losses after k steps, the predictions, and the mean's gradient in all that is carried.

        Its activations are freed before this returns.
        """
        weight = self.inner.weights[k]
        with torch.enable_grad():
            at = {name: w.detach().requires_grad_() for name, w in carry.items()}
            fast = params_at_step(at, self.inner, k)
            losses, predictions = task_losses(
                self.forward, fast, self.episodes.query_x, self.episodes.query_y, loss=self.loss
            )
            lam = grad_of(weight * losses.mean(), at, create_graph=False)
        return TaskLosses(weight * losses.detach(), predictions.detach()), lam

    def add_query_gradient(self, start: Snapshot, lam: Params) -> Params:
        """The adjoint with what the objective takes of the query loss where a step started."""
        if not self.inner.weights[start.step]:
            return lam
        with start.replay_rng():
            query, own = self.query_gradient(start.carry, start.step)
        check_losses_finite([], query.losses)
        self.query = TaskLosses(self.query.losses + query.losses, self.query.predictions)
        return {name: lam[name] + own[name] for name in lam}

    def outcome(self, lam: Params) -> MetaGradient:
        """The result, from lam_0."""
        grads = vjp_init_state(self.forward, self.params, self.episodes, self.inner, lam)
        return build_result(grads, self.query.losses, self.query.predictions, self.trajectory.support_losses)


def run_forward(forward: Forward, params: Params, episodes: Episodes, inner: InnerLoop, loss: Loss) -> ForwardPass:
    """K inner steps without graphs and the query pass.

    Nothing is kept for the way back where the adjoint passes every step as it is: in first order, if a step is plain
    and the objective is the last query loss.

    Raises:
        NonFiniteLossError: if a loss is NaN or infinite.
    """

    def step(k: int, carry: Params) -> tuple[Params, Tensor]:
        return inner_step(forward, carry, episodes.support_x, episodes.support_y, inner, loss=loss, k=k)

    passes_as_it_is = not inner.second_order and inner.plain and not any(inner.weights[:-1])
    theta = {name: p.detach() for name, p in params.items()}
    with torch.no_grad():
        carry = init_state(forward, theta, episodes.support_x, episodes.support_y, inner)
    carry, trajectory = rollout(step, carry, steps=inner.steps, every=None if passes_as_it_is else inner.snapshot_every)
    way = ForwardPass(forward, params, episodes, inner, loss, trajectory)
    way.arrive(carry)
    return way


def build_result(grads: Params, losses: Tensor, predictions: Tensor, support_losses: list[Tensor]) -> MetaGradient:
    """What every engine returns.

    Args:
        grads: d(mean objective) / d theta.
        losses: the objective, task by task.
        predictions: on the query sets, at theta_K.
        support_losses: before each step, ``[T]`` each.
    """
    losses = losses.detach()
    return MetaGradient(
        loss=losses.mean(),
        grads=grads,
        predictions=predictions.detach(),
        support_loss=torch.stack([s.mean() for s in support_losses]) if support_losses else losses.new_empty(0),
    )


def vjp_init_state(forward: Forward, params: Params, episodes: Episodes, inner: InnerLoop, lam: Params) -> Params:
    """Transpose ``init_state``: all tasks share theta, so that their adjoints ``[T, ...]`` add up to ``[...]``."""
    with torch.enable_grad():
        at = {name: p.detach().requires_grad_() for name, p in params.items()}
        carry = init_state(forward, at, episodes.support_x, episodes.support_y, inner)
        return vjp(carry, at, lam)


def refuse_without_gradient(engine: str, name: str, inner: InnerLoop, reasons: Mapping[str, str]) -> None:
    """Refuse settings that a gradient of another kind knows nothing of.

    Args:
        engine: its function, for the message.
        name: as papers call it.
        inner: the settings.
        reasons: why there is none, by setting.

    Raises:
        ValueError: naming the first setting that is there.
    """
    for setting, reason in reasons.items():
        if value := getattr(inner, setting):
            raise ValueError(f"{engine}: inner.{setting}={value!r}, which {name} has no gradient for: {reason}.")
