"""How the cost of a meta-gradient grows with inner steps, tasks, ways and width, on tasks of random images."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from metalearn.commands.benchmark.contenders import (
    BATCHES,
    OURS,
    TASKS_COMPARED,
    DisagreementError,
    Method,
    available_baselines,
    baseline,
    build_methods,
    check_gradients_equal,
    refuse_failed,
)
from metalearn.commands.benchmark.figures import plot_sweep
from metalearn.commands.benchmark.measure import MetaStep, peaks_mib, times
from metalearn.commands.benchmark.random_tasks import random_episodes
from metalearn.commands.benchmark.settings import SWEEPS, MetaStepSpec, Sweep
from metalearn.commands.benchmark.slopes import SweepSeries, log_log_slope
from metalearn.config.commands_schema import BenchmarkConfig
from metalearn.core import serialization as files
from metalearn.core.errors import NonFiniteError
from metalearn.core.profiling.allocator import configure_malloc
from metalearn.core.profiling.hardware import describe_hardware
from metalearn.core.profiling.timing import quartiles
from metalearn.inner import InnerLoop
from metalearn.metagrad.baselines.installed import Peer
from metalearn.models import Conv4
from metalearn.training.experiment import resolve_device
from metalearn.training.tracking.console import print_path, print_table, progress_bar


def run_sweeps(config: BenchmarkConfig, output_dir: Path) -> None:
    """Measure, print the slopes, and write ``benchmark.json`` and a plot for each sweep.

    Raises:
        RunError: if in some sweeps two contenders disagree on the meta-gradient; the others are written by then.
        ConfigError: if the device is not there.
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
                lines = measure(sweep, peers, config.bench.repeats, device, progress)
            except (DisagreementError, NonFiniteError) as error:
                failed[sweep.name] = error
                report["sweeps"][sweep.name] = {**asdict(sweep), "failed": str(error)}
                files.atomic_write_text(path, json.dumps(report, indent=2) + "\n")
                continue
            slopes[sweep.axis] = lines
            report["sweeps"][sweep.name] = {**asdict(sweep), "lines": [asdict(line) for line in lines]}
            files.atomic_write_text(path, json.dumps(report, indent=2) + "\n")
            note = f"at {sweep.base.title}, but for what is swept"
            figure = plot_sweep(sweep.axis, lines, f"How cost grows with the {sweep.axis}", note)
            figure.savefig(output_dir / f"sweep-{sweep.name}.png", dpi=130)
    if slopes:
        print_slopes(slopes)
    print_path("Written to", path)
    refuse_failed(failed, settings=len(report["sweeps"]))


def sweep_methods(inner: InnerLoop, peers: Mapping[str, Peer]) -> list[Method]:
    """Our ``unroll`` in both orders, and the yardstick of second order."""
    found = build_methods(inner, peers)
    against = baseline(peers)
    ours = [c for c in found if (c.library, c.engine) == (OURS, "unroll")]
    return ours + [c for c in found if c.library == against and c.second_order]


def measure(
    sweep: Sweep, peers: Mapping[str, Peer], rounds: int, device: torch.device, progress: Progress
) -> list[SweepSeries]:
    """A line for each contender; all are compared with one another at the first value.

    Raises:
        DisagreementError: if two of them disagree.
    """
    bar = progress.add_task(sweep.name, total=len(sweep.values), note="")
    seconds: dict[str, list[list[float]]] = {}
    memory: dict[str, list[float]] = {}
    for done, setting in enumerate(sweep.settings()):
        step = random_step(setting, device)
        found = sweep_methods(step.inner, peers)
        if done == 0:
            few = replace(setting, tasks=TASKS_COMPARED)
            check_gradients_equal(found, step.module, [random_episodes(few, device) for _ in range(BATCHES)])
        for name, peak in peaks_mib(step, found).items():
            memory.setdefault(name, []).append(peak)
        for name, measured in times(step, found, rounds).items():
            seconds.setdefault(name, []).append(list(measured))
        progress.update(bar, completed=done + 1)
    return [_line(name, sweep.values, seconds[name], memory[name]) for name in seconds]


def random_step(setting: MetaStepSpec, device: torch.device) -> MetaStep:
    """A meta-step on random images."""
    module = Conv4(setting.ways, width=setting.width).to(device)
    return MetaStep(module, random_episodes(setting, device), InnerLoop(lr=setting.lr, steps=setting.steps))


def _line(name: str, values: tuple[int, ...], seconds: list[list[float]], peaks: list[float]) -> SweepSeries:
    found = [quartiles(times) for times in seconds]
    medians = tuple(1000 * middle for _, middle, _ in found)
    return SweepSeries(
        name,
        values,
        median_ms=medians,
        quartiles_ms=tuple((1000 * low, 1000 * high) for low, _, high in found),
        peak_mib=tuple(peaks),
        slope_ms=log_log_slope(values, medians),
        slope_mib=log_log_slope(values, peaks),
    )


def print_slopes(lines_of: Mapping[str, list[SweepSeries]]) -> None:
    """A row for each sweep and contender: medians at both ends, and the exponents."""
    print_table(
        "How cost grows: p of cost ~ x^p, fitted on a log-log scale",
        ["", "x", "ms", "p of time", "MiB", "p of memory"],
        [
            [
                f"{axis}: {line.name}",
                f"{line.values[0]} to {line.values[-1]}",
                f"{line.median_ms[0]:.0f} to {line.median_ms[-1]:.0f}",
                f"{line.slope_ms:.2f}",
                f"{line.peak_mib[0]:.0f} to {line.peak_mib[-1]:.0f}",
                f"{line.slope_mib:.2f}",
            ]
            for axis, lines in lines_of.items()
            for line in lines
        ],
    )
