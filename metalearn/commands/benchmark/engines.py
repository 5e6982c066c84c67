"""Peak memory and time of every engine against the number of inner steps, on tasks of random images.

First order on all tasks at once is the yardstick. Exact second order is shown on all tasks at once, in chunks of four,
and one task at a time, each beside first order in the same chunks.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.progress import Progress

from metalearn.commands.benchmark.engine_figures import plot_memory
from metalearn.commands.benchmark.engine_settings import SETTINGS, EngineBenchmark, EngineCost
from metalearn.commands.benchmark.random_tasks import random_episodes
from metalearn.config.commands_schema import BenchmarkConfig
from metalearn.core import serialization as files
from metalearn.core.errors import RunError
from metalearn.core.functional import functionalize, relative_error
from metalearn.core.profiling.allocator import configure_malloc
from metalearn.core.profiling.device_memory import peak_bytes
from metalearn.core.profiling.hardware import describe_hardware
from metalearn.core.profiling.memory import MIB, MemoryLimitError
from metalearn.core.profiling.timing import quartiles, ratios, time_interleaved
from metalearn.core.types import Episodes, Params
from metalearn.inner import InnerLoop
from metalearn.metagrad import meta_gradient
from metalearn.models import Conv4
from metalearn.training.auto_engine import MetaStepProblem
from metalearn.training.experiment import resolve_device
from metalearn.training.tracking.console import print_path, print_table, progress_bar

_CHUNK = 4
_ONE = 1
_AGREEMENT = 1e-9  # relative, float64
_TASKS_COMPARED = 2


def variants(setting: EngineBenchmark, steps: int) -> Iterator[InnerLoop]:
    """What is compared at one K: all tasks at once, exact second order in chunks, and one task at a time."""
    base = InnerLoop(lr=0.1, steps=steps)
    for chunk in (None, _CHUNK, _ONE) if setting.tasks > _CHUNK else (None, _ONE):
        if chunk != _CHUNK:
            yield replace(base, task_chunk=chunk, second_order=False)
            yield replace(base, task_chunk=chunk, engine="unroll")
        yield replace(base, task_chunk=chunk, engine="checkpoint")
        yield replace(base, task_chunk=chunk, engine="adjoint")
        if chunk is not None and math.isqrt(steps) > _ONE:
            yield replace(base, task_chunk=chunk, engine="adjoint", snapshot_every=math.isqrt(steps))


def run_engine_table(config: BenchmarkConfig, output_dir: Path) -> None:
    """Measure every setting, print the tables, and write ``benchmark.json`` and a plot of memory for each.

    Raises:
        RunError: if two engines disagree.
        ConfigError: if the device is not there.
    """
    configure_malloc()
    device = resolve_device(config.run.device)
    limit = int(config.bench.memory_limit_mib * MIB)
    report = {
        "machine": describe_hardware(device),
        "limit_mib": config.bench.memory_limit_mib,
        "rounds": config.bench.repeats,
    }
    settings = [s for s in SETTINGS if config.bench.setting in ("all", s.name)]
    measured: dict[str, object] = {}
    path = output_dir / "benchmark.json"
    with progress_bar() as progress:
        for setting in settings:
            torch.manual_seed(config.run.seed)
            problem = random_problem(setting, device)
            rows = measure(
                problem,
                functools.partial(variants, setting),
                MeasurementPlan(setting.name, setting.steps, setting.timed, config.bench.repeats, limit),
                progress,
            )
            measured[setting.name] = {**asdict(setting), "rows": [asdict(row) for row in rows]}
            files.atomic_write_text(path, json.dumps({**report, "settings": measured}, indent=2) + "\n")
            plot_memory(setting.title, rows, config.bench.memory_limit_mib).savefig(
                output_dir / f"memory-{setting.name}.png", dpi=130
            )
            print_rows(setting, rows, config.bench.memory_limit_mib)
    print_path("Written to", path)


def random_problem(setting: EngineBenchmark, device: torch.device) -> MetaStepProblem:
    """Conv4 at its initial weights, on random images."""
    forward, theta = functionalize(Conv4(setting.ways, width=setting.width).to(device))
    return MetaStepProblem(forward, theta, random_episodes(setting, device))


@dataclass(frozen=True)
class MeasurementPlan:
    """At which numbers of inner steps to measure, and how long.

    Args:
        name: for the progress bar.
        steps: numbers K of inner steps.
        timed: those that are timed as well.
        rounds: times that each is timed.
        limit: bytes at which a measurement of memory is stopped.
    """

    name: str
    steps: Sequence[int]
    timed: Sequence[int]
    rounds: int
    limit: int


def measure(
    problem: MetaStepProblem, inners_at: Callable[[int], Iterable[InnerLoop]], grid: MeasurementPlan, progress: Progress
) -> list[EngineCost]:
    """A row for each inner loop at each K; the engines are compared with one another before they are timed.

    Raises:
        RunError: if two of them disagree.
    """
    rows: list[EngineCost] = []
    bar = progress.add_task(grid.name, total=len(grid.steps), note="")
    for done, steps in enumerate(grid.steps):
        inners = list(inners_at(steps))
        peaks = [_peak_mib(problem, inner, grid.limit) for inner in inners]
        times: dict[InnerLoop, list[float]] = {}
        if steps in grid.timed:
            fitting = [inner for inner, peak in zip(inners, peaks, strict=True) if peak is not None]
            if steps == grid.timed[-1]:
                check_gradients_equal(problem, fitting)
            times = time_interleaved(problem.seconds, [i for i in fitting if i.task_chunk != _ONE], grid.rounds)
        unroll = next((times[i] for i in times if i.engine == "unroll" and i.second_order and not i.task_chunk), None)
        rows += [_row(inner, peak, times.get(inner), unroll) for inner, peak in zip(inners, peaks, strict=True)]
        progress.update(bar, completed=done + 1)
    return rows


def _peak_mib(problem: MetaStepProblem, inner: InnerLoop, limit: int) -> float | None:
    """Peak of a meta-gradient. Two chunks show it: the second finds the sum that the first left, as all later do."""
    if inner.task_chunk is not None:
        problem = replace(problem, episodes=problem.episodes.split(2 * inner.task_chunk)[0])
    try:
        return peak_bytes(lambda: problem.step(inner), problem.device, limit=limit) / MIB
    except MemoryLimitError:
        return None


def check_gradients_equal(problem: MetaStepProblem, inners: list[InnerLoop]) -> None:
    """Refuse to time engines that do not compute the same thing, in float64, on few tasks and in chunks of one.

    Raises:
        RunError: naming the one that differs.
    """
    few = problem.episodes.split(_TASKS_COMPARED)[0]
    episodes = Episodes(few.support_x.double(), few.support_y, few.query_x.double(), few.query_y)
    theta = {name: p.double() for name, p in problem.params.items()}
    reference: dict[bool, Params] = {}
    for inner in inners:
        chunked = inner if inner.task_chunk is None else replace(inner, task_chunk=_ONE)
        grads = meta_gradient(problem.forward, theta, episodes, chunked).grads
        expected = reference.setdefault(inner.second_order, grads)
        error = relative_error(grads, expected)
        if not error < _AGREEMENT:
            raise RunError(f"{inner} differs from {inners[0].engine} by {error:.1e}; nothing was timed.")


def _row(inner: InnerLoop, peak: float | None, times: list[float] | None, unroll: list[float] | None) -> EngineCost:
    row = EngineCost(inner.engine, inner.second_order, inner.task_chunk, inner.snapshot_every, inner.steps, peak)
    if times is None:
        return row
    low, middle, high = (1000 * t for t in quartiles(times))
    ratio = ratios(times, unroll)[1] if unroll else None
    return replace(row, median_ms=middle, quartiles_ms=(low, high), ratio_to_unroll=ratio)


def print_rows(setting: EngineBenchmark, rows: list[EngineCost], limit_mib: float) -> None:
    """Two tables, engines down and K across: MiB, and times in units of ``unroll``'s on all tasks."""
    by_name: dict[str, dict[int, EngineCost]] = {}
    for row in rows:
        by_name.setdefault(row.name, {})[row.steps] = row
    print_table(
        f"{setting.title}: peak MiB (over: above {limit_mib:g})",
        ["", *(f"K={steps}" for steps in setting.steps)],
        [[name, *(_mib(at.get(steps)) for steps in setting.steps)] for name, at in by_name.items()],
    )
    print_table(
        "Time in units of unroll's on all tasks",
        ["", *(f"K={steps}" for steps in setting.timed)],
        [
            [name, *(_ratio(at.get(steps)) for steps in setting.timed)]
            for name, at in by_name.items()
            if any(row.ratio_to_unroll for row in at.values())
        ],
    )


def _mib(row: EngineCost | None) -> str:
    if row is None:
        return ""
    return "over" if row.peak_mib is None else f"{row.peak_mib:.0f}"


def _ratio(row: EngineCost | None) -> str:
    return f"{row.ratio_to_unroll:.2f}" if row is not None and row.ratio_to_unroll else ""
