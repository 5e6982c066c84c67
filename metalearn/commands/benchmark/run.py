"""Time one meta-step of this project and of other libraries, in turns, on the same weights and tasks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from metalearn.commands.benchmark.measure import (
    BenchmarkResult,
    MetaStep,
    RandomSampler,
    build_network,
    compute_results,
    peaks_mib,
    step_components,
    time_breakdown,
    times,
)
from metalearn.commands.benchmark.methods import (
    BATCHES,
    JAX,
    OURS,
    TASKS_COMPARED,
    Method,
    available_baselines,
    build_methods,
    check_gradients_equal,
    leave_out_unsupported,
    speed_reference,
)
from metalearn.commands.benchmark.plain import plain_methods
from metalearn.commands.benchmark.report import Report, plot_speed, print_results, print_time_breakdown
from metalearn.commands.benchmark.settings import (
    CONFIGURED,
    LIBRARY_SETTINGS,
    OMNIGLOT_IMAGE,
    MetaStepSpec,
    describe_tasks,
    selected,
)
from metalearn.config.commands_schema import BenchmarkConfig
from metalearn.core.errors import ConfigError
from metalearn.core.profiling.flops import meta_gradient_flops, peak_matmul_flops
from metalearn.core.profiling.timing import seconds
from metalearn.data.sampler import TaskSampler, TaskShape
from metalearn.data.splits import ImageSplits
from metalearn.inner import InnerLoop
from metalearn.metagrad.baselines.common import Baseline
from metalearn.training.experiment import build_experiment, build_model, load_data, num_outputs
from metalearn.training.runtime.precision import precision_context
from metalearn.training.state import seed_all
from metalearn.training.tracking.console import progress_bar


@dataclass(frozen=True, eq=False)
class BenchmarkCase:
    """A meta-step to be timed: its key in ``benchmark.json``, its title, its settings for the file, and its tasks."""

    name: str
    title: str
    content: dict[str, Any]
    step: MetaStep
    sampler: TaskSampler


def run_benchmark(config: BenchmarkConfig, output_dir: Path) -> None:
    """Compare the methods, print the tables, and write ``benchmark.json`` and ``speed.png``.

    Raises:
        RunError: if two methods disagree on the meta-gradient at a setting; the others are written by then.
        ConfigError: if the device does not exist, or the data set has too few classes.
        DataError: if the data set is missing or damaged.
    """
    baselines = available_baselines()
    against = speed_reference(baselines)
    facts = {"dataset": config.data.name, "rounds": config.bench.repeats, "yardstick": against}
    report = Report(config, output_dir, "settings", **facts)
    rows: dict[str, list[BenchmarkResult]] = {}
    shares: dict[str, dict[str, float]] = {}
    with precision_context("float32", report.device), progress_bar() as progress:
        for case in cases(config, report.device):
            with report.record(case.name, case.content) as entry:
                measured = measure_case(case, baselines, config, progress, keeps_memory=report.keeps_memory)
                entry |= {**measured, "rows": [asdict(row) for row in measured["rows"]]}
                rows[case.title], shares[case.name] = measured["rows"], measured["parts"]["share"]
                plot_speed(rows, against).savefig(output_dir / "speed.png", dpi=130)
                print_results(case.title, measured["rows"], measured["matrix_product_gflops"], against)
    if shares:
        print_time_breakdown(shares)
    report.close()


def cases(config: BenchmarkConfig, device: torch.device) -> Iterator[BenchmarkCase]:
    """Yield the cases of ``bench.setting``."""
    if config.bench.setting == CONFIGURED:
        yield _configured_case(config)
        return
    splits = load_data(config).to(device)
    for setting in selected(config, LIBRARY_SETTINGS):
        yield _setting_case(config, setting, splits)


def _configured_case(config: BenchmarkConfig) -> BenchmarkCase:
    experiment = build_experiment(config)
    seed_all(config.run.seed)
    module = build_model(config, experiment.train.example_shape, num_outputs(config, experiment.train)).to(
        experiment.device
    )
    task = config.task
    step = MetaStep(module, experiment.train.batch(0, task.meta_batch), experiment.inner)
    content = {"task": asdict(task), "inner": asdict(config.inner), "model": asdict(config.model)}
    tasks = describe_tasks(task.ways, task.shots, task.queries, task.meta_batch)
    title = f"{tasks}, {config.model.name}, K={config.inner.steps}"
    return BenchmarkCase(CONFIGURED, title, content, step, experiment.train)


def _setting_case(config: BenchmarkConfig, setting: MetaStepSpec, splits: ImageSplits) -> BenchmarkCase:
    seed_all(config.run.seed)
    sampler = _sampler(config, setting, splits)
    setting = replace(setting, image=tuple(sampler.example_shape))
    module = build_network(setting).to(splits.train.device)
    step = MetaStep(module, sampler.batch(0, setting.tasks), InnerLoop(lr=setting.lr, steps=setting.steps))
    return BenchmarkCase(setting.name, setting.title, asdict(setting), step, sampler)


def _sampler(config: BenchmarkConfig, setting: MetaStepSpec, splits: ImageSplits) -> TaskSampler:
    """Return tasks of the data set, or of random images for a setting with images of another shape than Omniglot's."""
    if setting.image != OMNIGLOT_IMAGE:
        return RandomSampler(setting, splits.train.device)
    classes = splits.classes("train")
    if setting.ways > classes:
        raise ConfigError(
            f"bench.setting={setting.name}: it takes {setting.ways} classes a task, and data={config.data.name} has "
            f"{classes} to train on; choose another setting, or increase data.classes"
        )
    shape = TaskShape(setting.ways, setting.shots, setting.queries)
    return splits.sampler("train", shape, config.run.seed)


def measure_case(
    case: BenchmarkCase,
    baselines: dict[str, Baseline],
    config: BenchmarkConfig,
    progress: Progress,
    *,
    keeps_memory: bool,
) -> dict[str, Any]:
    """Time methods that agree, or raise ``DisagreementError``; return the keys of ``benchmark.json``.

    Where this process ``keeps_memory`` on a CPU, our ``unroll`` is also timed in one that does not.
    """
    rounds = config.bench.repeats
    bar = progress.add_task(case.name, total=rounds + 1, note="same meta-gradient?")
    baselines = leave_out_unsupported(baselines, case.step.module, case.step.episodes, case.step.inner)
    methods = build_methods(case.step.inner, baselines)
    batches = [case.sampler.batch(index, TASKS_COMPARED) for index in range(BATCHES)]
    differences = check_gradients_equal(methods, case.step.module, batches)
    progress.update(bar, note="memory")
    peaks = peaks_mib(case.step, methods)
    progress.update(bar, note="")
    peak = peak_matmul_flops(case.step.device)
    process: AbstractContextManager[list[Method]] = (
        plain_methods(case.step) if keeps_memory and case.step.device.type == "cpu" else nullcontext([])
    )
    with process as plain:
        methods = sorted([*methods, *plain], key=lambda method: (not method.second_order, method.library != OURS))
        # The first call of each, in which JAX compiles, is none of the timed rounds.
        first_s = {
            m.name: seconds(partial(m.step, case.step.module, case.step.episodes), case.step.device) for m in methods
        }
        measured = times(
            case.step,
            methods,
            rounds,
            components=step_components(case.step, case.sampler, config.outer.lr),
            on_round=lambda done: progress.update(bar, completed=done),
        )
    against = speed_reference(baselines)
    flops = meta_gradient_flops(case.step.module, case.step.episodes, case.step.inner.steps)
    return {
        "largest_difference": differences,
        "matrix_product_gflops": peak / 1e9,
        "first_call_s": first_s,
        "jax_threads": _jax_threads() if JAX in baselines else None,
        "needed_gflop": {order: count / 1e9 for order, count in flops._asdict().items()},
        "parts": time_breakdown(methods, measured),
        "rows": compute_results(methods, measured, peaks, flops, against=against, matrix_product_peak=peak),
    }


def _jax_threads() -> int | None:
    from metalearn.commands.benchmark.jax import num_threads

    return num_threads()
