"""Regression on sinusoids (Finn et al. 2017, section 5.1): a task is one curve, given by K points of it.

y = A sin(x - phase),   A ~ U[0.1, 5.0],   phase ~ U[0, pi],   x ~ U[-5.0, 5.0]
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from metalearn.core.types import Episodes
from metalearn.data.counter_rng import task_keys, uniform

AMPLITUDES = (0.1, 5.0)
PHASES = (0.0, math.pi)
INPUTS = (-5.0, 5.0)


class Sinusoid(NamedTuple):
    """One task's function, ``y = amplitude * sin(x - phase)``."""

    amplitude: float
    phase: float


@dataclass(frozen=True)
class SinusoidSampler:
    """A sampler of regression tasks with K support points (``shots``) and Q queries of one curve each.

    Tasks are a pure function of (seed, split, index), and support sets do not depend on ``queries``. Everything is
    computed in float64 and rounded once, so that devices agree up to the last bit of their sines.

    Raises:
        ValueError: if there is not at least one shot and one query.

    Examples:
        >>> SinusoidSampler(10, 10, seed=0, split="train").tasks(0, 25).support_x.shape
        torch.Size([25, 10, 1])

    Reference: Finn et al. 2017, arXiv 1703.03400.
    """

    shots: int
    queries: int
    seed: int
    split: str
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        for name in ("shots", "queries"):
            if getattr(self, name) < 1:
                raise ValueError(f"SinusoidSampler: {name}={getattr(self, name)}; it must be at least 1.")

    @property
    def example_shape(self) -> torch.Size:
        """Shape of one input: a single number."""
        return torch.Size([1])

    def batch(self, index: int, tasks: int) -> Episodes:
        """Return batch number ``index`` of ``tasks`` tasks."""
        return self.tasks(index * tasks, tasks)

    def tasks(self, first: int, count: int) -> Episodes:
        """Return tasks ``first`` to ``first + count - 1``: x and y ``[T, S or Q, 1]`` float32."""
        keys = task_keys(self.seed, self.split, first, count, self.device)
        amplitude, phase = _curves(keys)
        x = _scale(INPUTS, uniform(keys, self.shots + self.queries, salt=2)).float()
        y = (amplitude[:, None] * torch.sin(x.double() - phase[:, None])).float()
        x, y = x.unsqueeze(-1), y.unsqueeze(-1)
        return Episodes(x[:, : self.shots], y[:, : self.shots], x[:, self.shots :], y[:, self.shots :])

    def curve(self, index: int) -> Sinusoid:
        """Return the function of task ``index``."""
        amplitude, phase = _curves(task_keys(self.seed, self.split, index, 1, "cpu"))
        return Sinusoid(amplitude.item(), phase.item())


def _curves(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return amplitudes and phases ``[T]`` float64."""
    u = uniform(keys, 2, salt=1)
    return _scale(AMPLITUDES, u[:, 0]), _scale(PHASES, u[:, 1])


def _scale(limits: tuple[float, float], u: Tensor) -> Tensor:
    low, high = limits
    return low + u * (high - low)
