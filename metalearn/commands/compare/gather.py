"""The results of a comparison from the folders of its runs, and the cost of a meta-gradient against its inner steps."""

from __future__ import annotations

import dataclasses
import logging
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.progress import Progress

from metalearn.commands.benchmark.engines import MeasurementPlan, measure
from metalearn.commands.benchmark.settings import EngineCost
from metalearn.commands.compare.results import CurvePoint, Difference, RunResult, TimeToAccuracy, VariantResult
from metalearn.commands.compare.statistics import difference, seed_ci, task_ci
from metalearn.commands.compare.variants import Job, Variant
from metalearn.config.commands_schema import CompareSettings
from metalearn.config.schema import TrainConfig
from metalearn.core import serialization as files
from metalearn.core.errors import RunError
from metalearn.core.json_files import read_json, read_metrics
from metalearn.core.profiling.hardware import describe_hardware
from metalearn.core.profiling.memory import MIB
from metalearn.inner import InnerLoop
from metalearn.metagrad import ENGINES
from metalearn.training.auto_engine import MetaStepProblem
from metalearn.training.experiment import build_experiment, resolve_device
from metalearn.training.tracking.event_files import ScalarEvent, read_scalars

log = logging.getLogger(__name__)

COST_FILE = "cost.json"
METRICS = (
    *("test.accuracy", "test.ci95", "test.accuracy_per_step", "test.ci95_per_step"),
    *("test.accuracy_nontransductive", "test.ci95_nontransductive", "time.meta_step_ms", "memory.peak_mib"),
)
"""Metrics that a comparison needs of a run."""
Scalars = dict[str, list[ScalarEvent]]
_ROUNDING = 1e-6  # event files hold float32


def measure_engine_costs(
    config: TrainConfig, settings: CompareSettings, folder: Path, progress: Progress, *, budget_s: float
) -> tuple[list[EngineCost], list[int]]:
    """Return the cost of the engines, and the numbers K of inner steps that were left out to save time.

    What was measured with the same settings on the same machine is loaded, and counts. ``inner.steps`` is always
    measured, and then the other K from the lowest on, as long as all are expected to take no longer than ``budget_s``.
    """
    steps = {*settings.steps, *([config.inner.steps] if config.inner.steps else [])}
    wanted = sorted(steps, key=lambda k: (k != config.inner.steps, k))
    conditions = {
        "machine": describe_hardware(resolve_device(config.run.device)),
        "precision": config.run.precision,
        "task": asdict(config.task),
        "model": asdict(config.model),
        "lr": config.inner.lr,
        "rounds": settings.repeats,
        "limit_mib": settings.memory_limit_mib,
    }
    path = folder / COST_FILE
    rows = [row for row in _read_costs(path, conditions) if row.steps in wanted]
    missing = [k for k in wanted if k not in {row.steps for row in rows}]
    if not missing:
        return rows, []
    log.info("Measuring one meta-gradient of either order and every engine in turns, at K = %s", _join(missing))
    experiment = build_experiment(config)
    problem = MetaStepProblem(experiment.forward, experiment.theta, experiment.train.batch(0, config.task.meta_batch))
    limit = int(settings.memory_limit_mib * MIB)
    budget_s -= sum(expected_seconds(rows, k, settings.repeats) for k in {row.steps for row in rows})
    seconds_per_step = 0.0  # of the last measurement, which may take longer than its rounds
    while missing:
        k = missing[0]
        expected = max(expected_seconds(rows, k, settings.repeats), seconds_per_step * k) if rows else 0.0
        if expected > budget_s:
            log.info(
                "K = %s left out: it would take longer than the training did. "
                "bench.kind=engines of the benchmark command measures many K.",
                _join(missing),
            )
            break
        plan = MeasurementPlan(f"memory and time at K = {k}", [k], [k], settings.repeats, limit)
        started = time.perf_counter()
        with experiment.precision():
            rows += measure(problem, lambda k: compared_inner_loops(config.inner.lr, k), plan, progress)
        taken = max(time.perf_counter() - started, expected_seconds(rows, k, settings.repeats))
        budget_s, seconds_per_step = budget_s - taken, taken / k
        missing = missing[1:]
        files.atomic_write_json(path, {**conditions, "rows": [asdict(row) for row in rows]})
    return rows, missing


def _read_costs(path: Path, conditions: Mapping[str, Any]) -> list[EngineCost]:
    """Return the costs in a file that were measured under these conditions; none of a damaged one."""
    try:
        content = read_json(path, "costs", "They are measured again.", required=["rows"])
        saved = content.pop("rows")
        if content != conditions:
            return []
        return [EngineCost(**{**row, "quartiles_ms": (q := row["quartiles_ms"]) and tuple(q)}) for row in saved]
    except FileNotFoundError:
        return []
    except (RunError, KeyError, TypeError) as error:
        log.warning("%s: %s", path, error)
        return []


_EXTRA_ROUNDS = 4  # one to warm up, and about three for the memory and the comparison of the gradients


def expected_seconds(rows: Sequence[EngineCost], steps: int, rounds: int) -> float:
    """Return how long the engines take to measure at some K, from the nearest K that was measured, in proportion."""
    nearest = min((row.steps for row in rows), key=lambda k: abs(k - steps))
    round_ms = sum(row.median_ms or 0 for row in rows if row.steps == nearest)
    return round_ms / 1000 * steps / nearest * (rounds + _EXTRA_ROUNDS)


def _join(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps))


def compared_inner_loops(lr: float, steps: int) -> list[InnerLoop]:
    """Return first order, which is the same for every engine, and second order by each."""
    base = InnerLoop(lr=lr, steps=steps)
    return [replace(base, second_order=False), *(replace(base, engine=engine) for engine in ENGINES)]


def collect_results(
    variants: Sequence[Variant], jobs: Sequence[Job], reasons: Mapping[Path, str], target: float | None
) -> tuple[list[VariantResult], float | None]:
    """Return every variant's result, and the target accuracy of their times.

    ``reasons`` tells why runs failed, by folder. A ``target`` of ``None`` is chosen by ``choose_target``.
    """
    runs = {job.folder: load_run(job, reasons.get(job.folder)) for job in jobs}
    scalars = {folder: _read_curves(folder) for folder, run in runs.items() if run.state == "finished"}
    validated = [[p.value for p in curves["accuracy/validation"]] for curves in scalars.values() if curves]
    if target is None and validated:
        target = choose_target(validated)
    results = []
    for variant in variants:
        folders = [job.folder for job in jobs if job.variant == variant.name]
        result = VariantResult(variant.name, variant.overrides, [runs[folder] for folder in folders])
        curves = [scalars[folder] for folder in folders if scalars.get(folder)]
        results.append(_add_metrics(result, curves, target) if result.finished else result)
    return results, target


def choose_target(validated: Sequence[Sequence[float]]) -> float:
    """Return the highest whole percentage that all runs reach in validation.

    If most reach that in their first validation, as beside one bad variant, it is the highest that half of them reach.
    """
    best = [max(accuracies) for accuracies in validated]
    target = _floor_percent(min(best))
    at_first = sum(accuracies[0] >= target - _ROUNDING for accuracies in validated)
    return target if 2 * at_first <= len(validated) else _floor_percent(statistics.median_high(best))


def _floor_percent(accuracy: float) -> float:
    return math.floor(100 * (accuracy + _ROUNDING)) / 100


def hardware_of(metrics: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the machine of some runs; where they differ, all values."""
    names = dict.fromkeys(name for m in metrics for name in m if name.startswith("machine."))
    return {
        name.removeprefix("machine."): " / ".join(dict.fromkeys(str(m.get(name)) for m in metrics)) for name in names
    }


def _read_curves(folder: Path) -> Scalars:
    """Return a run's curves; none where its event file is missing, as in archived results."""
    try:
        return read_scalars(folder)
    except RunError as error:
        log.warning("%s The report has no curves of this run.", error)
        return {}


def load_run(job: Job, reason: str | None) -> RunResult:
    """Return a run's state and metrics; ``reason`` is why it failed, if it did."""
    seed, name = job.config.run.seed, job.folder.name
    if (metrics := read_metrics(job.folder, required=METRICS)) is not None:
        return RunResult(seed, name, "finished", metrics=metrics)
    return RunResult(seed, name, "failed" if reason else "unfinished", reason)


def _add_metrics(result: VariantResult, scalars: list[Scalars], target: float | None) -> VariantResult:
    def column(name: str) -> list[Any]:
        return [run.metrics[name] for run in result.finished]

    tasks_ci95 = column("test.ci95")
    per_step = zip(*column("test.accuracy_per_step"), strict=True)
    per_step_ci95 = zip(*column("test.ci95_per_step"), strict=True)
    return dataclasses.replace(
        result,
        accuracy=seed_ci(column("test.accuracy"), tasks_ci95),
        tasks_ci95=task_ci(tasks_ci95),
        nontransductive=seed_ci(column("test.accuracy_nontransductive"), column("test.ci95_nontransductive")),
        per_step=[seed_ci(means, halves) for means, halves in zip(per_step, per_step_ci95, strict=True)],
        meta_step_ms=statistics.median(column("time.meta_step_ms")),
        peak_mib=max(column("memory.peak_mib")),
        training_s=statistics.fmean(s["cost/training_s"][-1].value for s in scalars) if scalars else None,
        time_to=None if target is None else time_to_accuracy(scalars, target),
        curve=aggregate_curve(scalars, "accuracy/validation"),
        cosine=aggregate_curve(scalars, "gradients/cosine_first_vs_second"),
    )


def aggregate_curve(scalars: Sequence[Scalars], tag: str) -> list[CurvePoint]:
    """Aggregate a tag over seeds, at the meta-steps that all of them have."""
    by_step = [{p.step: p.value for p in s.get(tag, [])} for s in scalars]
    times = [{p.step: p.value for p in s["cost/training_s"]} for s in scalars]
    common = sorted(set.intersection(*(set(points) for points in by_step))) if by_step else []
    points = []
    for step in common:
        values = [run[step] for run in by_step]
        seconds = statistics.fmean(run[step] for run in times)
        points.append(CurvePoint(step, seconds, statistics.fmean(values), min(values), max(values)))
    return points


def time_to_accuracy(scalars: Sequence[Scalars], target: float) -> TimeToAccuracy | None:
    """Return when validation first reached the target; ``None`` if it never did."""
    reached = []
    for run in scalars:
        seconds = {p.step: p.value for p in run["cost/training_s"]}
        first = next((p.step for p in run["accuracy/validation"] if p.value >= target - _ROUNDING), None)
        if first is not None:
            reached.append((seconds[first], first))
    if not reached:
        return None
    all_seconds, all_steps = zip(*reached, strict=True)
    return TimeToAccuracy(statistics.median_low(all_seconds), statistics.median_low(all_steps), len(reached))


def differences(variants: Sequence[Variant], results: Sequence[VariantResult], folder: Path) -> list[Difference]:
    """Return the first variant's accuracy minus that of each other one, over the seeds that both finished."""
    found = []
    first = results[0]
    for variant, other in zip(variants[1:], results[1:], strict=True):
        folders = [{run.seed: run.folder for run in result.finished} for result in (first, other)]
        seeds = [seed for seed in folders[0] if seed in folders[1]]
        if not seeds:
            continue
        paired = _test_tasks(variants[0]) == _test_tasks(variant)
        a, b = ([_read_tasks(folder / of[seed]) for seed in seeds] for of in folders)
        (accuracy, per_seed), (nontransductive, _) = (
            difference([run[name] for run in a], [run[name] for run in b], paired=paired)
            for name in ("accuracy", "accuracy_nontransductive")
        )
        found.append(Difference(first.name, other.name, accuracy, nontransductive, seeds, per_seed, paired))
    return found


def _read_tasks(run_dir: Path) -> dict[str, Any]:
    """Return the accuracy of every test task of a finished run."""
    path = run_dir / "test_tasks.json"
    remedy = f"Remove {run_dir / 'metrics.json'}, and the same command tests the run again; or restore it."
    try:
        return read_json(path, "the accuracies of a test", remedy, required=["accuracy", "accuracy_nontransductive"])
    except FileNotFoundError:
        raise RunError(f"{path}: there is no such file. {remedy}") from None


def _test_tasks(variant: Variant) -> tuple[Any, ...]:
    """Return the settings that, with the seed, determine the test tasks of a run."""
    config = variant.config
    return config.data, config.task.ways, config.task.shots, config.eval.queries, config.eval.episodes
