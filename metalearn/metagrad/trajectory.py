"""Run the inner loop without graphs, keep checkpoints, and replay its steps in reverse order.

    forwards:   theta_0 -> theta_1 -> ... -> theta_K, with a checkpoint of every s-th
    backwards:  theta_{K-1}, ..., theta_0; those between checkpoints are recomputed from the one before them

With s = 1 nothing is computed twice; with s near the square root of K about 2 sqrt(K) of the K checkpoints are in
memory at a time, for at most one more first-order step each. (Griewank & Walther 2008, "Evaluating derivatives",
chapter 12.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states

from metalearn.core.threads import one_thread_at_a_time
from metalearn.inner import InnerState, loss_checks_deferred

_TOLERANCE, _TOLERANCE_LOW_PRECISION = 1e-3, 5e-2
"""Relative difference of a recomputed loss: kernels may round differently, in bfloat16 to 8 bits."""

StepFn = Callable[[int, InnerState], tuple[InnerState, Tensor]]
"""The k-th inner step of every task: from the state to the next one, and the support losses ``[T]`` before it."""


@dataclass(frozen=True, eq=False)
class StepCheckpoint:
    """The beginning of an inner step: its number, the state, and torch's random generators, which dropout uses."""

    step: int
    state: InnerState
    cpu_rng: Tensor
    cuda_devices: list[int]
    cuda_rng: list[Tensor]

    @classmethod
    def of(cls, step: int, state: InnerState) -> StepCheckpoint:
        """Return a checkpoint with the generators' current states."""
        devices, rng_states = get_device_states(*state.values())
        return cls(step, state, torch.get_rng_state(), devices, rng_states)

    @contextmanager
    def replay_rng(self) -> Iterator[None]:
        """Draw the step's random numbers again inside; the generators are unchanged afterwards."""
        with one_thread_at_a_time(), torch.random.fork_rng(devices=self.cuda_devices):
            torch.set_rng_state(self.cpu_rng)
            set_device_states(self.cuda_devices, self.cuda_rng)
            yield


@dataclass(frozen=True, eq=False)
class Trajectory:
    """K inner steps that were taken, with checkpoints from which to take them again."""

    step_fn: StepFn
    steps: int
    checkpoint_every: int
    checkpoints: list[StepCheckpoint]  # of the steps 0, s, 2s, ...; ``reversed_steps`` frees each after its use
    support_losses: list[Tensor]  # before each step, ``[T]`` each

    def reversed_steps(self) -> Iterator[StepCheckpoint]:
        """Yield the beginnings of the steps K - 1, ..., 0, in this order; works once."""
        end = self.steps
        while self.checkpoints:
            first = (len(self.checkpoints) - 1) * self.checkpoint_every
            segment = [self.checkpoints.pop()]
            if end - first > 1:
                with segment[0].replay_rng():
                    for k in range(first + 1, end):
                        segment.append(StepCheckpoint.of(k, self.step_fn(k - 1, segment[-1].state)[0]))
            end = first
            while segment:
                yield segment.pop()

    def check_recomputation(self, recomputed: Mapping[int, Tensor]) -> Tensor | None:
        """Check that the model computed the same total support losses, by step, in the backward pass.

        Inside ``defer_loss_checks`` nothing is read: return, on the device, NaN if they differ and else 0, to be added
        to a loss that the caller checks later.

        Raises:
            ValueError: naming the step: the model draws from other generators than torch's, or has changed.
        """
        if not recomputed:
            return None
        before = torch.stack([self.support_losses[k].sum() for k in recomputed]).float()
        again = torch.stack(list(recomputed.values())).float()
        low_precision = torch.is_autocast_enabled(before.device.type)
        tolerance = _TOLERANCE_LOW_PRECISION if low_precision else _TOLERANCE
        differs = (before - again).abs() > tolerance * (1 + before.abs())
        if loss_checks_deferred():
            return torch.where(differs.any(), math.nan, 0.0)
        if differs.any():
            i = int(differs.nonzero()[0])
            raise ValueError(
                f"the support loss of inner step {list(recomputed)[i]} was {before[i].item():.6g} in the forward pass "
                f"and {again[i].item():.6g} when it was recomputed: the model is not the same function twice. "
                "Draw random numbers from torch's own generators (no torch.Generator, random or numpy), keep no "
                "state that a pass changes, or use engine='unroll', which computes everything once."
            )
        return None
