"""Measure one meta-step: every method's time, memory and FLOP rate, and the components of the time."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Adam

from metalearn.commands.benchmark.methods import JAX, OURS, Method
from metalearn.commands.benchmark.settings import MetaStepSpec, TaskSpec
from metalearn.core.functional import functionalize
from metalearn.core.params import expand_over_tasks
from metalearn.core.profiling.flops import StepFlops
from metalearn.core.profiling.memory import MIB, peak_bytes
from metalearn.core.profiling.timing import quartiles, ratios, seconds, time_interleaved
from metalearn.core.types import Episodes
from metalearn.data.sampler import TaskSampler
from metalearn.inner import InnerLoop, task_losses
from metalearn.models import MLP, Conv4, ResNet12

DATA, FORWARD, GRADIENT, SECOND_ORDER, OPTIMISER = "data", "forward", "gradient", "second-order pass", "optimiser"
_TIMED_COMPONENTS = (DATA, FORWARD, OPTIMISER)  # measured directly


@dataclass(frozen=True, eq=False)
class MetaStep:
    """A module at its initial parameters, T tasks, and the inner loop, whose order and engine methods replace."""

    module: nn.Module
    episodes: Episodes
    inner: InnerLoop

    @property
    def device(self) -> torch.device:
        """Device of the tasks."""
        return self.episodes.query_x.device


def random_meta_step(setting: MetaStepSpec, device: torch.device) -> MetaStep:
    """Return a meta-step on random images."""
    module = build_network(setting).to(device)
    return MetaStep(module, random_episodes(setting, device), InnerLoop(lr=setting.lr, steps=setting.steps))


def build_network(setting: TaskSpec) -> nn.Module:
    """Return the setting's network, at initial weights from torch's generator."""
    channels, width = setting.image[0], setting.width
    if setting.model == "mlp":
        return MLP(math.prod(setting.image), setting.ways, hidden=(width, width // 2, width // 4, width // 4))
    if setting.model == "resnet12":
        return ResNet12(setting.ways, channels=channels, widths=(width, 2 * width, 4 * width, 8 * width))
    pool = "max" if setting.model == "conv4 max-pool" else "stride"
    return Conv4(setting.ways, channels=channels, width=width, pool=pool)


@dataclass(frozen=True)
class RandomSampler:
    """A stream of tasks of random images, by torch's generator: without a data set there is none to reproduce."""

    setting: TaskSpec
    device: torch.device

    @property
    def example_shape(self) -> torch.Size:
        """Shape of one image."""
        return torch.Size(self.setting.image)

    def tasks(self, first: int, count: int) -> Episodes:
        """Return ``count`` tasks."""
        return random_episodes(replace(self.setting, tasks=count), self.device)

    batch = tasks


def random_episodes(setting: TaskSpec, device: torch.device) -> Episodes:
    """Return random images ``[T, N * examples, *image]`` in class order; content changes neither memory nor time."""
    labels = torch.arange(setting.ways, device=device)

    def images(each: int) -> Tensor:
        return torch.rand(setting.tasks, setting.ways * each, *setting.image, device=device)

    def targets(each: int) -> Tensor:
        return labels.repeat_interleave(each).repeat(setting.tasks, 1)

    return Episodes(images(setting.shots), targets(setting.shots), images(setting.queries), targets(setting.queries))


@dataclass(frozen=True)
class BenchmarkResult:
    """A method's cost of one meta-gradient: medians and quartiles over rounds.

    Args:
        speed: median over rounds of the baseline's time in the same order divided by this method's.
        gflops: 1e9 FLOPs a second at the median, counting only FLOPs that the meta-gradient needs.
        peak_mib: of live tensors; ``None`` for JAX and other processes, where it is not measured.
        percent_of_peak: rate as a percentage of this machine's rate of matrix products.
    """

    library: str
    engine: str
    second_order: bool
    median_ms: float
    quartiles_ms: tuple[float, float]
    steps_per_s: float
    speed: float
    speed_quartiles: tuple[float, float]
    peak_mib: float | None
    gflops: float
    percent_of_peak: float

    @property
    def label(self) -> str:
        """Library and engine, as ``Method.label``."""
        return f"{self.library} {self.engine}".strip()


Times = Mapping[str, Sequence[float]]
"""Seconds in each round, by the name of a method or of a component of a meta-step."""


def peaks_mib(step: MetaStep, methods: Sequence[Method]) -> dict[str, float]:
    """Return the peak memory of every method by its name, MiB; JAX's arrays are no tensors, and not seen."""
    peaks = {}
    for method in methods:
        if method.library == JAX:
            continue
        step.module.zero_grad()  # learn2learn leaves gradients on the module
        peaks[method.name] = peak_bytes(partial(method.step, step.module, step.episodes), step.device) / MIB
    step.module.zero_grad()
    return peaks


def times(
    step: MetaStep,
    methods: Sequence[Method],
    rounds: int,
    *,
    components: Mapping[str, Callable[[], object]] | None = None,
    on_round: Callable[[int], object] = lambda done: None,
) -> Times:
    """Time every method, and every component of a meta-step, in turns."""
    calls: dict[str, Callable[[], object]] = {m.name: partial(m.step, step.module, step.episodes) for m in methods}
    calls |= components or {}
    return time_interleaved(lambda name: seconds(calls[name], step.device), list(calls), rounds, on_round=on_round)


def compute_results(
    methods: Sequence[Method],
    measured: Times,
    peaks: Mapping[str, float],
    flops: StepFlops,
    *,
    against: str,
    matrix_product_peak: float,
) -> list[BenchmarkResult]:
    """Compute rates and ratios from the methods' times, their memory (MiB) and the FLOPs of one meta-gradient.

    The library ``against`` has speed 1 in either order; ``matrix_product_peak`` is in FLOP/s.
    """
    baseline_times = {m.second_order: measured[m.name] for m in methods if m.library == against}
    rows = []
    for method in methods:
        low, middle, high = quartiles(measured[method.name])
        slow, speed, fast = ratios(baseline_times[method.second_order], measured[method.name])
        rate = (flops.second_order if method.second_order else flops.first_order) / middle
        rows.append(
            BenchmarkResult(
                method.library,
                method.engine,
                method.second_order,
                median_ms=1000 * middle,
                quartiles_ms=(1000 * low, 1000 * high),
                steps_per_s=1 / middle,
                speed=speed,
                speed_quartiles=(slow, fast),
                peak_mib=peaks.get(method.name),
                gflops=rate / 1e9,
                percent_of_peak=100 * rate / matrix_product_peak,
            )
        )
    return rows


def step_components(step: MetaStep, sampler: TaskSampler, lr: float) -> dict[str, Callable[[], object]]:
    """Return the components of a training's meta-step that can be timed alone: data, forward passes and optimiser.

    The forward passes are K on the support sets and one on the query sets, of all tasks, without a graph.
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
    def run_forward() -> None:
        for _ in range(step.inner.steps):
            task_losses(forward, fast, episodes.support_x, episodes.support_y, loss=cross_entropy)
        task_losses(forward, fast, episodes.query_x, episodes.query_y, loss=cross_entropy)

    return {DATA: lambda: sampler.batch(next(batches), tasks), FORWARD: run_forward, OPTIMISER: adam.step}


def time_breakdown(methods: Sequence[Method], measured: Times) -> dict[str, Any]:
    """Return how the time of a second-order meta-step of our ``unroll`` is spent, by differences of medians.

    Returns:
        ``ms``: milliseconds of each component; ``share``: its fraction of their sum. The gradient is first order minus
        the forward passes, the second-order pass is second order minus first; a negative difference counts as 0.
    """
    unroll = {
        m.second_order: quartiles(measured[m.name])[1] for m in methods if (m.library, m.engine) == (OURS, "unroll")
    }
    data, forward, optimiser = (quartiles(measured[name])[1] for name in _TIMED_COMPONENTS)
    taken = {DATA: data, FORWARD: forward, OPTIMISER: optimiser}
    taken |= {GRADIENT: max(0.0, unroll[False] - forward), SECOND_ORDER: max(0.0, unroll[True] - unroll[False])}
    total = sum(taken.values())
    return {
        "ms": {name: 1000 * value for name, value in taken.items()},
        "share": {name: value / total for name, value in taken.items()},
    }


@dataclass(frozen=True)
class SweepSeries:
    """A method's cost at each value of a sweep; slopes are the exponents p of cost ~ value^p."""

    name: str
    values: tuple[int, ...]
    median_ms: tuple[float, ...]
    quartiles_ms: tuple[tuple[float, float], ...]
    peak_mib: tuple[float, ...]
    slope_ms: float
    slope_mib: float


def log_log_slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the exponent p of y = c x^p, by least squares of log y on log x.

    Raises:
        ValueError: if x or y is invalid.

    Examples:
        >>> round(log_log_slope([1, 2, 4], [3, 12, 48]), 12)
        2.0
    """
    if len(set(x)) < 2 or min(*x, *y) <= 0:
        raise ValueError(f"log_log_slope: {x=}, {y=}; give two or more different x, and only positive numbers.")
    return statistics.linear_regression([math.log(v) for v in x], [math.log(v) for v in y]).slope
