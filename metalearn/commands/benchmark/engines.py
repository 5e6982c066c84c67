"""Measure peak memory and time of every engine against the number of inner steps, on random images."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.progress import Progress

from metalearn.commands.benchmark.measure import build_network, random_episodes
from metalearn.commands.benchmark.report import Report, plot_memory, print_engine_costs
from metalearn.commands.benchmark.settings import ENGINE_SETTINGS, EngineBenchmark, EngineCost, selected
from metalearn.config.commands_schema import BenchmarkConfig
from metalearn.core.errors import RunError
from metalearn.core.functional import functionalize
from metalearn.core.params import relative_error
from metalearn.core.profiling.memory import MIB, MemoryLimitError, peak_bytes
from metalearn.core.profiling.timing import quartiles, ratios, time_interleaved
from metalearn.core.types import Episodes, Params
from metalearn.inner import InnerLoop
from metalearn.metagrad import meta_gradient
from metalearn.training.auto_engine import MetaStepProblem
from metalearn.training.runtime.precision import precision_context
from metalearn.training.tracking.console import progress_bar

_CHUNK = 4
_ONE = 1
_TOLERANCE = 1e-9  # relative, float64
_TASKS_COMPARED = 2


def variants(setting: EngineBenchmark, steps: int) -> Iterator[InnerLoop]:
    """Yield the inner loops to compare at one K: all tasks at once, second order in chunks, and one task at a time."""
    base = InnerLoop(lr=0.1, steps=steps)
    for chunk in (None, _CHUNK, _ONE) if setting.tasks > _CHUNK else (None, _ONE):
        if chunk != _CHUNK:
            yield replace(base, task_chunk=chunk, second_order=False)
            yield replace(base, task_chunk=chunk, engine="unroll")
        yield replace(base, task_chunk=chunk, engine="checkpoint")
        yield replace(base, task_chunk=chunk, engine="adjoint")
        if chunk is not None and math.isqrt(steps) > _ONE:
            yield replace(base, task_chunk=chunk, engine="adjoint", checkpoint_every=math.isqrt(steps))


def run_engine_table(config: BenchmarkConfig, output_dir: Path) -> None:
    """Measure every setting, print the tables, and write ``benchmark.json`` and a plot of memory for each.

    Raises:
        RunError: if two engines disagree.
        ConfigError: if the device does not exist.
    """
    limit_mib, rounds = config.bench.memory_limit_mib, config.bench.repeats
    report = Report(config, output_dir, "settings", limit_mib=limit_mib, rounds=rounds)
    with precision_context("float32", report.device), progress_bar() as progress:
        for setting in selected(config, ENGINE_SETTINGS):
            torch.manual_seed(config.run.seed)
            forward, theta = functionalize(build_network(setting).to(report.device))
            problem = MetaStepProblem(forward, theta, random_episodes(setting, report.device))
            plan = MeasurementPlan(setting.name, setting.steps, setting.timed, rounds, int(limit_mib * MIB))
            with report.record(setting.name, asdict(setting)) as entry:
                rows = measure(problem, functools.partial(variants, setting), plan, progress)
                entry["rows"] = [asdict(row) for row in rows]
                plot = plot_memory(setting.title, rows, limit_mib)
                plot.savefig(output_dir / f"memory-{setting.name}.png", dpi=130)
                print_engine_costs(setting, rows, limit_mib)
    report.close()


@dataclass(frozen=True)
class MeasurementPlan:
    """Numbers K of inner steps (``timed``: those whose time is measured too), and the memory limit in bytes."""

    name: str
    steps: Sequence[int]
    timed: Sequence[int]
    rounds: int
    limit: int


def measure(
    problem: MetaStepProblem, inners_at: Callable[[int], Iterable[InnerLoop]], plan: MeasurementPlan, progress: Progress
) -> list[EngineCost]:
    """Return the cost of each inner loop at each K; raise ``RunError`` before timing if two engines disagree."""
    rows: list[EngineCost] = []
    bar = progress.add_task(plan.name, total=len(plan.steps), note="")
    for done, steps in enumerate(plan.steps):
        inners = list(inners_at(steps))
        peaks = [_peak_mib(problem, inner, plan.limit) for inner in inners]
        times: dict[InnerLoop, list[float]] = {}
        if steps in plan.timed:
            fitting = [inner for inner, peak in zip(inners, peaks, strict=True) if peak is not None]
            if steps == plan.timed[-1]:
                check_engines_equal(problem, fitting)
            timed = [i for i in fitting if i.task_chunk != _ONE]
            times = time_interleaved(lambda i: problem.seconds(_stacked(i, problem)), timed, plan.rounds)
        unroll = next((times[i] for i in times if i.engine == "unroll" and i.second_order and not i.task_chunk), None)
        rows += [_cost(inner, peak, times.get(inner), unroll) for inner, peak in zip(inners, peaks, strict=True)]
        progress.update(bar, completed=done + 1)
    return rows


def _stacked(inner: InnerLoop, problem: MetaStepProblem) -> InnerLoop:
    """Return the inner loop with all tasks in a pass if it sets no number, where the default might take fewer."""
    return replace(inner, task_chunk=inner.task_chunk or problem.episodes.tasks)


def _peak_mib(problem: MetaStepProblem, inner: InnerLoop, limit: int) -> float | None:
    """Return the peak of a meta-gradient. Two chunks suffice: the second adds to a sum, as all later ones do."""
    if inner.task_chunk is not None:
        problem = replace(problem, episodes=problem.episodes.split(2 * inner.task_chunk)[0])
    try:
        return peak_bytes(lambda: problem.step(_stacked(inner, problem)), problem.device, limit=limit) / MIB
    except MemoryLimitError:
        return None


def check_engines_equal(problem: MetaStepProblem, inners: list[InnerLoop]) -> None:
    """Raise ``RunError`` unless engines compute equal gradients in float64, on two tasks, in chunks of one."""
    few = problem.episodes.split(_TASKS_COMPARED)[0]
    episodes = Episodes(few.support_x.double(), few.support_y, few.query_x.double(), few.query_y)
    theta = {name: p.double() for name, p in problem.params.items()}
    reference: dict[bool, Params] = {}
    for inner in inners:
        chunked = inner if inner.task_chunk is None else replace(inner, task_chunk=_ONE)
        grads = meta_gradient(problem.forward, theta, episodes, chunked).grads
        expected = reference.setdefault(inner.second_order, grads)
        error = relative_error(grads, expected)
        if not error < _TOLERANCE:
            raise RunError(f"{inner} differs from {inners[0].engine} by {error:.1e}; nothing was timed.")


def _cost(inner: InnerLoop, peak: float | None, times: list[float] | None, unroll: list[float] | None) -> EngineCost:
    cost = EngineCost(inner.engine, inner.second_order, inner.task_chunk, inner.checkpoint_every, inner.steps, peak)
    if times is None:
        return cost
    low, middle, high = (1000 * t for t in quartiles(times))
    ratio = ratios(times, unroll)[1] if unroll else None
    return replace(cost, median_ms=middle, quartiles_ms=(low, high), ratio_to_unroll=ratio)
