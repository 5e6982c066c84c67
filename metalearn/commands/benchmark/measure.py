"""One setting measured: every contender's time, memory and rate, and what a meta-step's time is made of."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import Adam

from metalearn.commands.benchmark.contenders import OURS, Method
from metalearn.core.functional import expand_over_tasks, functionalize
from metalearn.core.profiling.flops import StepFlops, meta_gradient_flops
from metalearn.core.profiling.memory import MIB, peak_bytes
from metalearn.core.profiling.timing import quartiles, ratios, seconds, time_interleaved
from metalearn.core.types import Episodes
from metalearn.data.sampler import TaskSampler
from metalearn.inner import InnerLoop, task_losses

DATA, FORWARD, GRADIENT, SECOND_ORDER, OPTIMISER = "data", "forward", "gradient", "second-order pass", "optimiser"
_PARTS = (DATA, FORWARD, OPTIMISER)  # those that are timed by themselves


@dataclass(frozen=True, eq=False)
class MetaStep:
    """What is timed.

    Args:
        module: at its initial parameters.
        episodes: one batch of T tasks, on the device.
        inner: the inner loop; contenders replace its order and engine.
    """

    module: nn.Module
    episodes: Episodes
    inner: InnerLoop

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.episodes.query_x.device

    def flops(self) -> StepFlops:
        """What it needs."""
        return meta_gradient_flops(self.module, self.episodes, self.inner.steps)


@dataclass(frozen=True)
class BenchmarkResult:
    """A contender's cost of one meta-gradient.

    Args:
        library: of ``Method``.
        engine: of ours.
        second_order: or first order.
        median_ms: over rounds.
        quartiles_ms: over rounds.
        steps_per_s: meta-gradients a second, at the median.
        speed: times the yardstick's in the same order: the median over rounds of its time over this one's.
        speed_quartiles: of the same.
        peak_mib: of memory, as ``runs/memory.py`` says.
        gflops: FLOPs that the meta-gradient needs (and not those that were spent), in 1e9 a second, at the median.
        percent_of_peak: of what matrix products reach on this machine.
    """

    library: str
    engine: str
    second_order: bool
    median_ms: float
    quartiles_ms: tuple[float, float]
    steps_per_s: float
    speed: float
    speed_quartiles: tuple[float, float]
    peak_mib: float
    gflops: float
    percent_of_peak: float

    @property
    def who(self) -> str:
        """Library and engine, as ``Method.who``."""
        return f"{self.library} {self.engine}".strip()


Times = Mapping[str, Sequence[float]]
"""Seconds in each round, by the name of a contender or of a part of a meta-step."""


def peaks_mib(step: MetaStep, found: Sequence[Method]) -> dict[str, float]:
    """Peak memory of every contender by its name, MiB."""
    peaks = {}
    for contender in found:
        step.module.zero_grad()  # learn2learn leaves its gradients there
        peaks[contender.name] = peak_bytes(lambda c=contender: c.step(step.module, step.episodes), step.device) / MIB  # type: ignore[misc]
    step.module.zero_grad()
    return peaks


def times(
    step: MetaStep,
    found: Sequence[Method],
    rounds: int,
    *,
    parts: Mapping[str, Callable[[], object]] | None = None,
    on_round: Callable[[int], object] = lambda done: None,
) -> Times:
    """Every contender, and every part of a meta-step that is given, in turns."""
    calls: dict[str, Callable[[], object]] = {c.name: _call(c, step) for c in found}
    calls |= parts or {}
    return time_interleaved(lambda name: seconds(calls[name], step.device), list(calls), rounds, on_round=on_round)


def _call(contender: Method, step: MetaStep) -> Callable[[], object]:
    return lambda: contender.step(step.module, step.episodes)


def compute_results(
    found: Sequence[Method],
    measured: Times,
    peaks: Mapping[str, float],
    flops: StepFlops,
    *,
    against: str,
    matrix_product_peak: float,
) -> list[BenchmarkResult]:
    """Rates and ratios of what was timed.

    Args:
        found: every contender.
        measured: their times.
        peaks: their memory, MiB.
        flops: that one meta-gradient needs.
        against: the library whose speed is 1, in either order.
        matrix_product_peak: FLOP/s.
    """
    yard = {c.second_order: measured[c.name] for c in found if c.library == against}
    rows = []
    for contender in found:
        own = measured[contender.name]
        low, middle, high = quartiles(own)
        slow, speed, fast = ratios(yard[contender.second_order], own)
        rate = (flops.second_order if contender.second_order else flops.first_order) / middle
        rows.append(
            BenchmarkResult(
                contender.library,
                contender.engine,
                contender.second_order,
                median_ms=1000 * middle,
                quartiles_ms=(1000 * low, 1000 * high),
                steps_per_s=1 / middle,
                speed=speed,
                speed_quartiles=(slow, fast),
                peak_mib=peaks[contender.name],
                gflops=rate / 1e9,
                percent_of_peak=100 * rate / matrix_product_peak,
            )
        )
    return rows


def step_components(step: MetaStep, sampler: TaskSampler, lr: float) -> dict[str, Callable[[], object]]:
    """What a training's meta-step does beside its gradients, each to be timed by itself.

    Args:
        step: the forward passes are its K on the support sets and one on the query sets, of all tasks, without a graph.
        sampler: whose next batch is drawn at each call.
        lr: Adam's.
    """
    forward, theta = functionalize(step.module)
    tasks, episodes = step.episodes.tasks, step.episodes
    fast = expand_over_tasks(theta, tasks)
    batches = itertools.count()
    weights = [p.clone().requires_grad_() for p in theta.values()]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    adam = Adam(weights, lr=lr)

    @torch.no_grad()
    def pass_forward() -> None:
        for _ in range(step.inner.steps):
            task_losses(forward, fast, episodes.support_x, episodes.support_y, loss=cross_entropy)
        task_losses(forward, fast, episodes.query_x, episodes.query_y, loss=cross_entropy)

    def sample() -> None:
        sampler.batch(next(batches), tasks)

    def optimise() -> None:
        adam.step()

    return dict(zip(_PARTS, (sample, pass_forward, optimise), strict=True))


def time_breakdown(found: Sequence[Method], measured: Times) -> dict[str, Any]:
    """What a second-order meta-step of our ``unroll`` is made of, by differences of medians.

    Returns:
        ``ms``: milliseconds of each part; ``share``: its fraction of their sum. The gradient is first order less the
        forward passes, the second-order pass is second order less first; a difference below 0 counts as 0.
    """
    unroll = {
        c.second_order: quartiles(measured[c.name])[1] for c in found if (c.library, c.engine) == (OURS, "unroll")
    }
    data, forward, optimiser = (quartiles(measured[part])[1] for part in _PARTS)
    taken = {
        DATA: data,
        FORWARD: forward,
        GRADIENT: max(0.0, unroll[False] - forward),
        SECOND_ORDER: max(0.0, unroll[True] - unroll[False]),
        OPTIMISER: optimiser,
    }
    total = sum(taken.values())
    return {
        "ms": {part: 1000 * value for part, value in taken.items()},
        "share": {part: value / total for part, value in taken.items()},
    }
