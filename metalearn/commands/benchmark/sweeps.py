"""Measure how the cost of a meta-gradient grows with inner steps, tasks, ways and width, on random images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

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
    DisagreementError,
    Method,
    available_baselines,
    baseline,
    build_methods,
    check_gradients_equal,
    raise_if_failed,
)
from metalearn.commands.benchmark.report import plot_sweep, print_slopes, write_json
from metalearn.commands.benchmark.settings import SWEEPS, Sweep
from metalearn.config.commands_schema import BenchmarkConfig
from metalearn.core.errors import NonFiniteError
from metalearn.core.profiling.hardware import configure_malloc, describe_hardware
from metalearn.core.profiling.timing import quartiles
from metalearn.inner import InnerLoop
from metalearn.metagrad.baselines.common import Peer
from metalearn.training.experiment import resolve_device
from metalearn.training.tracking.console import print_path, progress_bar


def run_sweeps(config: BenchmarkConfig, output_dir: Path) -> None:
    """Measure, print the slopes, and write ``benchmark.json`` and a plot for each sweep.

    Raises:
        RunError: if two methods disagree on the meta-gradient in a sweep; the others are written by then.
        ConfigError: if the device does not exist.
    """
    configure_malloc()
    device = resolve_device(config.run.device)
    peers = available_baselines()
    report: dict[str, Any] = {"machine": describe_hardware(device), "rounds": config.bench.repeats, "sweeps": {}}
    path = output_dir / "benchmark.json"
    slopes: dict[str, list[SweepSeries]] = {}
    failed: dict[str, Exception] = {}
    with progress_bar() as progress:
        for sweep in SWEEPS:
            if config.bench.setting not in ("all", sweep.name):
                continue
            torch.manual_seed(config.run.seed)
            try:
                lines = measure_sweep(sweep, peers, config.bench.repeats, device, progress)
            except (DisagreementError, NonFiniteError) as error:
                failed[sweep.name] = error
                report["sweeps"][sweep.name] = {**asdict(sweep), "failed": str(error)}
                write_json(path, report)
                continue
            slopes[sweep.axis] = lines
            report["sweeps"][sweep.name] = {**asdict(sweep), "lines": [asdict(line) for line in lines]}
            write_json(path, report)
            note = f"at {sweep.base.title}, except for the swept value"
            figure = plot_sweep(sweep.axis, lines, f"How cost grows with the {sweep.axis}", note)
            figure.savefig(output_dir / f"sweep-{sweep.name}.png", dpi=130)
    if slopes:
        print_slopes(slopes)
    print_path("Written to", path)
    raise_if_failed(failed, settings=len(report["sweeps"]))


def sweep_methods(inner: InnerLoop, peers: Mapping[str, Peer]) -> list[Method]:
    """Return our ``unroll`` in both orders, and the baseline in second order."""
    methods, against = build_methods(inner, peers), baseline(peers)
    ours = [method for method in methods if (method.library, method.engine) == (OURS, "unroll")]
    return ours + [method for method in methods if method.library == against and method.second_order]


def measure_sweep(
    sweep: Sweep, peers: Mapping[str, Peer], rounds: int, device: torch.device, progress: Progress
) -> list[SweepSeries]:
    """Return a series for each method; all are compared with one another at the first value.

    Raises:
        DisagreementError: if two methods disagree.
    """
    bar = progress.add_task(sweep.name, total=len(sweep.values), note="")
    seconds: dict[str, list[list[float]]] = {}
    memory: dict[str, list[float]] = {}
    for done, setting in enumerate(sweep.settings()):
        step = random_meta_step(setting, device)
        methods = sweep_methods(step.inner, peers)
        if done == 0:
            few = replace(setting, tasks=TASKS_COMPARED)
            check_gradients_equal(methods, step.module, [random_episodes(few, device) for _ in range(BATCHES)])
        for name, peak in peaks_mib(step, methods).items():
            memory.setdefault(name, []).append(peak)
        for name, measured in times(step, methods, rounds).items():
            seconds.setdefault(name, []).append(list(measured))
        progress.update(bar, completed=done + 1)
    return [_series(name, sweep.values, seconds[name], memory[name]) for name in seconds]


def _series(name: str, values: tuple[int, ...], seconds: list[list[float]], peaks: list[float]) -> SweepSeries:
    quartiles_at = [quartiles(rounds) for rounds in seconds]
    medians = tuple(1000 * middle for _, middle, _ in quartiles_at)
    return SweepSeries(
        name,
        values,
        median_ms=medians,
        quartiles_ms=tuple((1000 * low, 1000 * high) for low, _, high in quartiles_at),
        peak_mib=tuple(peaks),
        slope_ms=log_log_slope(values, medians),
        slope_mib=log_log_slope(values, peaks),
    )
