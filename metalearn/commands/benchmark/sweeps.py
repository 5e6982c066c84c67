"""Measure how the cost of a meta-gradient grows with inner steps, tasks, ways and width, on random images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.progress import Progress

from metalearn.commands.benchmark.measure import (
    SweepSeries,
    log_log_slope,
    peaks_mib,
    random_episodes,
    random_meta_step,
    times,
)
from metalearn.commands.benchmark.methods import (
    BATCHES,
    OURS,
    TASKS_COMPARED,
    Method,
    available_baselines,
    build_methods,
    check_gradients_equal,
    speed_reference,
)
from metalearn.commands.benchmark.report import Report, plot_sweep, print_slopes
from metalearn.commands.benchmark.settings import SWEEPS, Sweep, selected
from metalearn.config.commands_schema import BenchmarkConfig
from metalearn.core.profiling.timing import quartiles
from metalearn.inner import InnerLoop
from metalearn.metagrad.baselines.common import Baseline
from metalearn.training.runtime.precision import precision_context
from metalearn.training.tracking.console import progress_bar


def run_sweeps(config: BenchmarkConfig, output_dir: Path) -> None:
    """Measure, print the slopes, and write ``benchmark.json`` and a plot for each sweep.

    Raises:
        RunError: if two methods disagree on the meta-gradient in a sweep; the others are written by then.
        ConfigError: if the device does not exist.
    """
    baselines = available_baselines()
    report = Report(config, output_dir, "sweeps", rounds=config.bench.repeats)
    slopes: dict[str, list[SweepSeries]] = {}
    with precision_context("float32", report.device), progress_bar() as progress:
        for sweep in selected(config, SWEEPS):
            torch.manual_seed(config.run.seed)
            with report.record(sweep.name, asdict(sweep)) as entry:
                lines = measure_sweep(sweep, baselines, config.bench.repeats, report.device, progress)
                slopes[sweep.axis] = lines
                entry["lines"] = [asdict(line) for line in lines]
                note = f"at {sweep.base.title}, except for the swept value"
                figure = plot_sweep(sweep.axis, lines, f"How cost grows with the {sweep.axis}", note)
                figure.savefig(output_dir / f"sweep-{sweep.name}.png", dpi=130)
    if slopes:
        print_slopes(slopes)
    report.close()


def sweep_methods(inner: InnerLoop, baselines: Mapping[str, Baseline]) -> list[Method]:
    """Return our ``unroll`` in both orders, and the reference of speeds in second order."""
    methods, against = build_methods(inner, baselines), speed_reference(baselines)
    ours = [method for method in methods if (method.library, method.engine) == (OURS, "unroll")]
    return ours + [method for method in methods if method.library == against and method.second_order]


def measure_sweep(
    sweep: Sweep, baselines: Mapping[str, Baseline], rounds: int, device: torch.device, progress: Progress
) -> list[SweepSeries]:
    """Return a series for each method, or raise ``DisagreementError`` at the first value."""
    bar = progress.add_task(sweep.name, total=len(sweep.values), note="")
    points: dict[str, list[tuple[float, float, float, float]]] = {}
    for done, setting in enumerate(sweep.settings()):
        step = random_meta_step(setting, device)
        methods = sweep_methods(step.inner, baselines)
        if done == 0:
            few = replace(setting, tasks=TASKS_COMPARED)
            check_gradients_equal(methods, step.module, [random_episodes(few, device) for _ in range(BATCHES)])
        peaks = peaks_mib(step, methods)
        for name, seconds in times(step, methods, rounds).items():
            low, middle, high = (1000 * t for t in quartiles(seconds))
            points.setdefault(name, []).append((low, middle, high, peaks[name]))
        progress.update(bar, completed=done + 1)
    return [_series(name, sweep.values, *zip(*found, strict=True)) for name, found in points.items()]


def _series(
    name: str, x: tuple[int, ...], low: Sequence[float], middle: Sequence[float], high: Sequence[float],
    peaks: Sequence[float],
) -> SweepSeries:  # fmt: skip
    ranges = tuple(zip(low, high, strict=True))
    slopes = log_log_slope(x, middle), log_log_slope(x, peaks)
    return SweepSeries(name, x, tuple(middle), ranges, tuple(peaks), *slopes)
