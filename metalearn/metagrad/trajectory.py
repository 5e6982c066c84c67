"""The inner loop walked forwards without graphs, and back again step by step.

    forwards:  theta_0 -> theta_1 -> ... -> theta_K, of which every s-th is kept
    back:      theta_{K-1}, ..., theta_0; those between are computed again from the one kept before them

With s = 1 nothing is computed twice; with s near the square root of K about 2 sqrt(K) of the K snapshots are in memory
at a time, for at most one more first-order step each. (Griewank & Walther 2008, "Evaluating derivatives", chapter 12.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states

from metalearn.core.types import Params

_ROUNDING, _ROUNDING_LOW = 1e-3, 5e-2
"""How far a loss may be off when it is computed again: kernels may round otherwise, in bfloat16 to 8 bits."""

StepFn = Callable[[int, Params], tuple[Params, Tensor]]
"""The k-th inner step of every task: what is carried to the next one, and the support losses ``[T]`` before it."""


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What an inner step began with: its number, what was carried, and torch's generators, which dropout draws from."""

    step: int
    carry: Params
    cpu_rng: Tensor
    cuda_devices: list[int]
    cuda_rng: list[Tensor]

    @classmethod
    def of(cls, step: int, carry: Params) -> Snapshot:
        """Here and now."""
        devices, states = get_device_states(*carry.values())
        return cls(step, carry, torch.get_rng_state(), devices, states)

    @contextmanager
    def replay_rng(self) -> Iterator[None]:
        """Inside, the generators draw what they drew when the step was taken; outside, nothing has happened."""
        with torch.random.fork_rng(devices=self.cuda_devices):
            torch.set_rng_state(self.cpu_rng)
            set_device_states(self.cuda_devices, self.cuda_rng)
            yield


@dataclass(frozen=True, eq=False)
class Trajectory:
    """K inner steps that were taken.

    Args:
        step: how one is taken.
        steps: K.
        every: s, the distance of the starts that were kept.
        kept: those of the steps 0, s, 2s, ...; emptied on the way back, so that each is freed when it is done with.
        support_losses: before each step, ``[T]`` each.
    """

    step: StepFn
    steps: int
    every: int
    kept: list[Snapshot]
    support_losses: list[Tensor]

    def check_recomputation(self, repeated: dict[int, Tensor]) -> None:
        """Refuse a model that did not compute the same again.

        Args:
            repeated: total support loss by step, as it came out on the way back.

        Raises:
            ValueError: naming the step: something other than torch's generators was drawn from, or the model changed.
        """
        if not repeated:
            return
        taken = torch.stack([self.support_losses[k].sum() for k in repeated]).float()
        again = torch.stack(list(repeated.values())).float()
        tolerance = _ROUNDING_LOW if torch.is_autocast_enabled(taken.device.type) else _ROUNDING
        differs = ((taken - again).abs() > tolerance * (1 + taken.abs())).nonzero()
        if len(differs):
            at = int(differs[0])
            raise ValueError(
                f"the support loss of inner step {list(repeated)[at]} was {taken[at].item():.6g} on the way forwards "
                f"and {again[at].item():.6g} when it was computed again: the model is not the same function twice. "
                "Draw random numbers from torch's own generators (no torch.Generator, random or numpy), keep no "
                "state that a pass changes, or use engine='unroll', which computes everything once."
            )

    def back(self) -> Iterator[Snapshot]:
        """What the steps K - 1, ..., 0 began with, in this order; can be walked once."""
        end = self.steps
        while self.kept:
            first = (len(self.kept) - 1) * self.every
            segment = [self.kept.pop()]
            if end - first > 1:
                with segment[0].replay_rng():
                    for k in range(first + 1, end):
                        segment.append(Snapshot.of(k, self.step(k - 1, segment[-1].carry)[0]))
            end = first
            while segment:
                yield segment.pop()


def rollout(step: StepFn, carry: Params, *, steps: int, every: int | None) -> tuple[Params, Trajectory]:
    """Take K inner steps.

    Args:
        step: takes one; it must not build a graph.
        carry: into the first.
        steps: K.
        every: keep what every s-th step began with; ``None`` keeps nothing, for who does not come back.

    Returns:
        What is carried out of the last, and the trajectory that leads back from it.
    """
    kept, support_losses = [], []
    for k in range(steps):
        if every is not None and k % every == 0:
            kept.append(Snapshot.of(k, carry))
        carry, losses = step(k, carry)
        support_losses.append(losses)
    return carry, Trajectory(step, steps, every or 1, kept, support_losses)
