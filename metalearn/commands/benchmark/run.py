"""One meta-step, timed side by side with other libraries' on the same weights and tasks.

First all must give the same meta-gradient; then they take turns. Times are medians over rounds, with the quartiles. A
setting at which they do not agree is left out, and the command ends with an error after the others.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from metalearn.commands.benchmark.check import CONFIGURED
from metalearn.commands.benchmark.contenders import (
    BATCHES,
    TASKS_COMPARED,
    DisagreementError,
    available_baselines,
    baseline,
    build_methods,
    check_gradients_equal,
    refuse_failed,
)
from metalearn.commands.benchmark.figures import plot_speed
from metalearn.commands.benchmark.measure import (
    BenchmarkResult,
    MetaStep,
    compute_results,
    peaks_mib,
    step_components,
    time_breakdown,
    times,
)
from metalearn.commands.benchmark.report import print_rows, print_shares
from metalearn.commands.benchmark.settings import SETTINGS, MetaStepSpec
from metalearn.config.commands_schema import BenchmarkConfig
from metalearn.core import serialization as files
from metalearn.core.errors import ConfigError, NonFiniteError
from metalearn.core.profiling.allocator import configure_malloc
from metalearn.core.profiling.flops import peak_matmul_flops
from metalearn.core.profiling.hardware import describe_hardware
from metalearn.data.sampler import TaskSampler, TaskShape
from metalearn.data.splits import ImageSplits
from metalearn.inner import InnerLoop
from metalearn.metagrad.baselines.installed import Peer
from metalearn.models import Conv4
from metalearn.training.experiment import build_experiment, build_model, resolve_device
from metalearn.training.random_state import seed_all
from metalearn.training.runtime.precision import precision_context
from metalearn.training.tasks import load_data
from metalearn.training.tracking.console import print_path, progress_bar


@dataclass(frozen=True, eq=False)
class Case:
    """A meta-step, and where it comes from.

    Args:
        name: for files.
        title: in words.
        content: for ``benchmark.json``.
        step: what is timed.
        sampler: of its tasks.
    """

    name: str
    title: str
    content: dict[str, Any]
    step: MetaStep
    sampler: TaskSampler


def run_benchmark(config: BenchmarkConfig, output_dir: Path) -> None:
    """Compare, print the tables, and write ``benchmark.json`` and ``speed.png``.

    Raises:
        RunError: if at some settings two contenders disagree on the meta-gradient; the others are written by then.
        ConfigError: if the device is not there, or the data set has too few classes.
        DataError: if the data set is missing or damaged.
    """
    configure_malloc()
    device = resolve_device(config.run.device)
    peers = available_baselines()
    against = baseline(peers)
    report: dict[str, Any] = {
        "machine": describe_hardware(device),
        "dataset": config.data.name,
        "rounds": config.bench.repeats,
        "yardstick": against,
        "settings": {},
    }
    path = output_dir / "benchmark.json"
    rows: dict[str, list[BenchmarkResult]] = {}
    parts: dict[str, dict[str, float]] = {}
    failed: dict[str, Exception] = {}
    with precision_context("float32", device), progress_bar() as progress:
        for case in cases(config, device):
            try:
                measured = measure(case, peers, config, progress)
            except (DisagreementError, NonFiniteError) as error:
                failed[case.name] = error
                report["settings"][case.name] = {**case.content, "failed": str(error)}
                files.atomic_write_text(path, json.dumps(report, indent=2) + "\n")
                continue
            report["settings"][case.name] = {**case.content, **measured, "rows": [asdict(r) for r in measured["rows"]]}
            files.atomic_write_text(path, json.dumps(report, indent=2) + "\n")
            rows[case.title], parts[case.title] = measured["rows"], measured["parts"]["share"]
            plot_speed(rows, against).savefig(output_dir / "speed.png", dpi=130)
            print_rows(case.title, measured["rows"], measured["matrix_product_gflops"], against)
    if parts:
        print_shares(parts)
    print_path("Written to", path)
    refuse_failed(failed, settings=len(report["settings"]))


def cases(config: BenchmarkConfig, device: torch.device) -> Iterator[Case]:
    """What ``bench.setting`` stands for, one after the other."""
    if config.bench.setting == CONFIGURED:
        yield _configured(config)
        return
    splits = load_data(config).to(device)
    for setting in SETTINGS:
        if config.bench.setting in ("all", setting.name):
            yield _published(config, setting, splits)


def _configured(config: BenchmarkConfig) -> Case:
    experiment = build_experiment(config)
    seed_all(config.run.seed)
    module = build_model(config, experiment.train.example_shape).to(experiment.device)
    task = config.task
    step = MetaStep(module, experiment.train.batch(0, task.meta_batch), experiment.inner)
    content = {"task": asdict(task), "inner": asdict(config.inner), "model": asdict(config.model)}
    title = (
        f"{task.ways}-way {task.shots}-shot, {task.queries} quer{'y' if task.queries == 1 else 'ies'}, "
        f"{task.meta_batch} tasks, {config.model.name}, K={config.inner.steps}"
    )
    return Case(CONFIGURED, title, content, step, experiment.train)


def _published(config: BenchmarkConfig, setting: MetaStepSpec, splits: ImageSplits) -> Case:
    classes = splits.classes("train")
    if setting.ways > classes:
        raise ConfigError(
            f"bench.setting={setting.name}: it takes {setting.ways} classes a task, and data={config.data.name} has "
            f"{classes} to train on; choose another setting, or raise data.classes"
        )
    shape = TaskShape(setting.ways, setting.shots, setting.queries)
    sampler = splits.sampler("train", shape, config.run.seed)
    seed_all(config.run.seed)
    module = Conv4(setting.ways, channels=sampler.example_shape[0], width=setting.width).to(splits.train.device)
    step = MetaStep(module, sampler.batch(0, setting.tasks), InnerLoop(lr=setting.lr, steps=setting.steps))
    return Case(setting.name, setting.title, asdict(setting), step, sampler)


def measure(case: Case, peers: dict[str, Peer], config: BenchmarkConfig, progress: Progress) -> dict[str, Any]:
    """Check, then time; the keys of ``benchmark.json``, with ``rows`` as ``BenchmarkResult``.

    Raises:
        DisagreementError: if two contenders disagree on the meta-gradient.
    """
    rounds = config.bench.repeats
    bar = progress.add_task(case.name, total=rounds + 1, note="same meta-gradient?")
    found = build_methods(case.step.inner, peers)
    draws = [case.sampler.batch(index, TASKS_COMPARED) for index in range(BATCHES)]
    differences = check_gradients_equal(found, case.step.module, draws)
    progress.update(bar, note="memory")
    peaks = peaks_mib(case.step, found)
    progress.update(bar, note="")
    peak = peak_matmul_flops(case.step.device)
    measured = times(
        case.step,
        found,
        rounds,
        parts=step_components(case.step, case.sampler, config.outer.lr),
        on_round=lambda done: progress.update(bar, completed=done),
    )
    flops = case.step.flops()
    return {
        "largest_difference": differences,
        "matrix_product_gflops": peak / 1e9,
        "needed_gflop": {order: count / 1e9 for order, count in flops._asdict().items()},
        "parts": time_breakdown(found, measured),
        "rows": compute_results(found, measured, peaks, flops, against=baseline(peers), matrix_product_peak=peak),
    }
