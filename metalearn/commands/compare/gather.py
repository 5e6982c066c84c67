"""From the folders of runs to the figures of a comparison."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metalearn.commands.compare.results import CurvePoint, Difference, RunResult, TimeToAccuracy, VariantResult
from metalearn.commands.compare.statistics import difference, seed_ci, task_ci
from metalearn.commands.compare.variants import Job, Variant
from metalearn.config.schema import TrainConfig
from metalearn.core.errors import RunError
from metalearn.training.tracking.event_files import ScalarEvent, read_scalars

log = logging.getLogger(__name__)

Scalars = dict[str, list[ScalarEvent]]

_ROUNDING = 1e-6  # event files hold float32


def collect_results(
    variants: Sequence[Variant], jobs: Sequence[Job], reasons: Mapping[Path, str], target: float | None
) -> tuple[list[VariantResult], float | None]:
    """Every variant's figures, and the target accuracy that their times are about.

    Args:
        variants: in order.
        jobs: all runs.
        reasons: why some failed, by folder.
        target: validation accuracy; ``None`` for the highest whole percentage that all finished runs reach.
    """
    runs = {job.folder: load_run(job, reasons.get(job.folder)) for job in jobs}
    scalars = {folder: _curves(folder) for folder, run in runs.items() if run.state == "finished"}
    drawn = [curves for curves in scalars.values() if curves]
    if target is None and drawn:
        lowest = min(max(p.value for p in s["validation/accuracy"]) for s in drawn)
        target = math.floor(100 * (lowest + _ROUNDING)) / 100
    found = []
    for variant in variants:
        folders = [job.folder for job in jobs if job.variant == variant.name]
        own = [scalars[folder] for folder in folders if scalars.get(folder)]
        result = VariantResult(variant.name, variant.overrides, [runs[folder] for folder in folders])
        found.append(_with_figures(result, own, target) if result.finished else result)
    return found, target


def _curves(folder: Path) -> Scalars:
    """A run's curves; none where its event file was left behind, as when results are archived."""
    try:
        return read_scalars(folder)
    except RunError as error:
        log.warning("%s The report has no curves of this run.", error)
        return {}


def load_run(job: Job, reason: str | None) -> RunResult:
    """What became of a run."""
    seed, name = job.config.run.seed, job.folder.name
    path = job.folder / "metrics.json"
    if path.exists():
        return RunResult(seed, name, "finished", metrics=json.loads(path.read_text()))
    return RunResult(seed, name, "failed" if reason else "unfinished", reason)


def _with_figures(result: VariantResult, scalars: list[Scalars], target: float | None) -> VariantResult:
    metrics = [run.metrics for run in result.finished]

    def column(name: str) -> list[Any]:
        return [m[name] for m in metrics]

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
        training_s=statistics.fmean(s["time/training_s"][-1].value for s in scalars) if scalars else None,
        time_to=None if target is None else time_to_accuracy(scalars, target),
        curve=aggregate_curve(scalars, "validation/accuracy"),
        cosine=aggregate_curve(scalars, "grad/cosine_first_vs_second"),
    )


def aggregate_curve(scalars: Sequence[Scalars], tag: str) -> list[CurvePoint]:
    """A tag over seeds, at the meta-steps that all of them have."""
    by_step = [{p.step: p.value for p in s.get(tag, [])} for s in scalars]
    times = [{p.step: p.value for p in s["time/training_s"]} for s in scalars]
    common = sorted(set.intersection(*(set(points) for points in by_step))) if by_step else []
    points = []
    for step in common:
        values = [run[step] for run in by_step]
        seconds = statistics.fmean(run[step] for run in times)
        points.append(CurvePoint(step, seconds, statistics.fmean(values), min(values), max(values)))
    return points


def time_to_accuracy(scalars: Sequence[Scalars], target: float) -> TimeToAccuracy | None:
    """When validation first reached the target."""
    reached = []
    for run in scalars:
        seconds = {p.step: p.value for p in run["time/training_s"]}
        first = next((p.step for p in run["validation/accuracy"] if p.value >= target - _ROUNDING), None)
        if first is not None:
            reached.append((seconds[first], first))
    if not reached:
        return None
    seconds_of_all, steps_of_all = zip(*reached, strict=True)
    return TimeToAccuracy(statistics.median_low(seconds_of_all), statistics.median_low(steps_of_all), len(reached))


def differences(variants: Sequence[Variant], results: Sequence[VariantResult], folder: Path) -> list[Difference]:
    """The first variant's accuracy minus each other one's, over the seeds that both finished."""
    found = []
    first, first_config = results[0], variants[0].config
    for variant, other in zip(variants[1:], results[1:], strict=True):
        seeds = [r.seed for r in first.finished if r.seed in [o.seed for o in other.finished]]
        if not seeds:
            continue
        paired = _test_tasks(first_config) == _test_tasks(variant.config)
        ours, theirs = ([_tasks(folder, v, seed) for seed in seeds] for v in (first, other))
        (accuracy, per_seed), (alone, _) = (
            difference([run[name] for run in ours], [run[name] for run in theirs], paired=paired)
            for name in ("accuracy", "accuracy_nontransductive")
        )
        found.append(Difference(first.name, other.name, accuracy, alone, seeds, per_seed, paired))
    return found


def _test_tasks(config: TrainConfig) -> tuple[Any, ...]:
    """What decides, with the seed, on which tasks a run is tested."""
    return config.data, config.task.ways, config.task.shots, config.eval.queries, config.eval.episodes


def _tasks(folder: Path, variant: VariantResult, seed: int) -> dict[str, list[float]]:
    (run,) = [r for r in variant.finished if r.seed == seed]
    content: dict[str, list[float]] = json.loads((folder / run.folder / "test_tasks.json").read_text())
    return content
