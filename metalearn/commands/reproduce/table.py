"""The results of rows, from the metrics of their runs: on disk, and as cells of a table."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from metalearn.commands.compare.gather import hardware_of
from metalearn.commands.compare.statistics import difference, seed_ci, task_ci
from metalearn.commands.compare.tables import format_points
from metalearn.commands.compare.variants import Job, replace_in
from metalearn.commands.reproduce.plan import Published, TableRow, published
from metalearn.core import json_files
from metalearn.core import serialization as files
from metalearn.core.errors import RunError
from metalearn.training.evaluation import MeanCI

Metrics = Mapping[str, Any]

_OF_RUN = {
    "seed": "seed",
    "accuracy": "test.accuracy",
    "ci95": "test.ci95",
    "nontransductive": "test.accuracy_nontransductive",
    "nontransductive_ci95": "test.ci95_nontransductive",
    "accuracy_per_step": "test.accuracy_per_step",
    "validation": "validation.best_accuracy",
    "chosen_at": "validation.best_iteration",
}
"""Names of a run's metrics in a row, and in ``metrics.json``."""


def read_metrics(job: Job) -> Metrics | None:
    """Return a finished run's metrics, else ``None``; raise ``RunError`` if they are damaged or another run's."""
    path = job.folder / "metrics.json"
    config = job.config
    expected = {
        "dataset": config.data.name,
        "algorithm": config.algorithm.name,
        "second_order": config.inner.second_order,
        "seed": config.run.seed,
        "task": f"{config.task.ways}-way {config.task.shots}-shot",
        "iterations": config.outer.iterations,
        "test.episodes": config.eval.episodes,
    }
    metrics = json_files.read_metrics(job.folder, required=(*expected, "test.accuracy", "test.ci95"))
    if metrics is None:
        return None
    for name, value in expected.items():
        if metrics[name] != value:
            raise RunError(
                f"{path} is of another run: its {name} is {metrics[name]}, but {value} is requested. Use another "
                "folder with hydra.run.dir=PATH, or remove this run's."
            )
    return metrics


def read_rotated(job: Job) -> Metrics | None:
    """Return the metrics of a run's test with rotated test classes; ``None`` if there was none, or of fewer tasks."""
    path = job.folder / ROTATED / "metrics.json"
    try:
        metrics: Metrics = json.loads(path.read_text())
        expected = {"test.episodes": job.config.eval.episodes, "rotate_test": True}
        return metrics if {name: metrics[name] for name in expected} == expected else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def gain_over_first_order(row: TableRow) -> dict[str, Any] | None:
    """Return the mean of second order's accuracy minus first order's, paired by test task, with its 95% interval.

    Of each seed both orders have the same initial parameters, training tasks and test tasks. ``None`` for a first-order
    row, and where the runs of first order beside this row's are not finished.
    """
    if row.order != "second":
        return None
    first = [
        dataclasses.replace(
            job,
            folder=job.folder.with_name(job.folder.name.replace("second", "first")),
            config=replace_in(job.config, "inner", second_order=False),
        )
        for job in row.jobs
    ]
    if any(read_metrics(job) is None for job in first):
        return None
    try:
        scores = [
            [json.loads((job.folder / "test_tasks.json").read_text())["accuracy"] for job in jobs]
            for jobs in (row.jobs, first)
        ]
        if [len(tasks) for tasks in scores[0]] != [len(tasks) for tasks in scores[1]]:
            return None
        found, of_seeds = difference(scores[0], scores[1], paired=True)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    over_seeds = seed_ci(of_seeds, [0.0] * len(of_seeds)).ci95  # without the variation among tasks
    return {
        "mean": found.mean,
        "ci95": found.ci95,
        "over": "seeds" if over_seeds == found.ci95 else "tasks",
        "runs": of_seeds,
    }


def row_results(row: TableRow, metrics: Sequence[Metrics]) -> dict[str, Any]:
    """Return a row from the metrics of every seed, as it is saved: accuracies are fractions, intervals half-widths."""
    config = row.jobs[0].config
    rotated = [found for job in row.jobs if (found := read_rotated(job)) is not None]
    ways, shots = config.task.ways, config.task.shots
    reported = published(config.algorithm.name, row.order, ways, shots) if config.data.name == "omniglot" else None
    return {
        "experiment": row.experiment,
        "algorithm": config.algorithm.name,
        "order": row.order,
        "dataset": config.data.name,
        "ways": ways,
        "shots": shots,
        "seeds": row.seeds,
        "accuracy": estimate(metrics, "test.accuracy", "test.ci95"),
        "nontransductive": estimate(metrics, "test.accuracy_nontransductive", "test.ci95_nontransductive"),
        "rotated": estimate(rotated, "test.accuracy", "test.ci95") if len(rotated) == len(metrics) else None,
        "gain": gain_over_first_order(row),
        "runs": [
            {name: m[key] for name, key in _OF_RUN.items()} | {"minutes": m["time.total_s"] / 60} for m in metrics
        ],
        "test_tasks": config.eval.episodes,
        "inner_steps": config.inner.steps,
        "test_inner_steps": config.inner.eval_steps,
        "iterations": config.outer.iterations,
        "tasks_per_step": config.task.meta_batch,
        "minutes": statistics.fmean(m["time.total_s"] for m in metrics) / 60,
        "machine": hardware_of(metrics),
        "commits": sorted({m["commit"] for m in metrics if m.get("commit")}),
        "overrides": row.overrides,
        "command": row.command,
        "published": reported and reported._asdict(),
    }


def estimate(metrics: Sequence[Metrics], mean: str, ci95: str) -> dict[str, Any] | None:
    """Return a mean over seeds with its 95% interval, and what that is over: ``seeds`` (Student's t) or ``tasks``.

    It is over the test tasks for one seed, and for several seeds that agree more closely than that by chance. Return
    ``None`` if a run has no such metric.
    """
    if any(m[mean] is None for m in metrics):
        return None
    halves = [m[ci95] for m in metrics]
    found = seed_ci([m[mean] for m in metrics], halves)
    return {"mean": found.mean, "ci95": found.ci95, "over": "seeds" if found.ci95 > task_ci(halves) else "tasks"}


ROTATED = "rotated_test"
"""The folder in a run's that holds its test with rotated test classes."""

FILE = "omniglot.json"
"""The rows, in ``outputs/reproduction/`` and, if they are recorded, in ``outputs/reference/``."""

Row = Mapping[str, Any]


def read_rows(path: Path) -> list[Row]:
    """Return the rows in a file, none if it does not exist; raise ``RunError`` if it cannot be read."""
    if not path.exists():
        return []
    try:
        rows: list[Row] = json.loads(path.read_text())["rows"]
        for row in rows:
            cells(row)  # fails if something is missing
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is not a file of rows: {error!r}. Move it away, or restore it.") from error
    return rows


def _key(row: Row) -> tuple[str, str]:
    return row["experiment"], row["order"]


def check_enough_seeds(path: Path, experiment: str, order: str, seeds: Sequence[int]) -> None:
    """Raise ``RunError`` if a row would be replaced by one with fewer seeds."""
    for row in read_rows(path):
        if _key(row) == (experiment, order) and len(row["seeds"]) > len(seeds):
            raise RunError(
                f"seeds={list(seeds)}: {path} holds {experiment}, {order} order, with more seeds, {row['seeds']}, "
                "which would be lost. Ask for at least as many, or remove that row from the file."
            )


def upsert_row(path: Path, row: Row) -> None:
    """Add or replace one row of a file; raise ``RunError`` if the former row has more seeds."""
    check_enough_seeds(path, *_key(row), row["seeds"])
    rows = {_key(other): other for other in read_rows(path)}
    former = rows.get(_key(row), {})
    if former.get("runs") == row["runs"]:  # of the same runs, what was measured before and is not there now
        row = {**row, **{name: former.get(name) for name in ("gain", "rotated") if row[name] is None}}
    rows[_key(row)] = row
    files.atomic_write_json(path, {"rows": list(rows.values())})


def cells(row: Row) -> dict[str, str]:
    """Return what a table says of a row, by the heads of the columns."""
    return {
        "accuracy": format_interval(row["accuracy"]),
        "gain over first order": format_gain(row.get("gain")),
        "non-transductive": format_interval(row["nontransductive"]),
        "rotated test classes": format_interval(row.get("rotated")),
        "published": format_published(row["published"]),
        "seeds": " ".join(map(str, row["seeds"])),
        "minutes a seed": f"{row['minutes']:.0f}",
    }


def render(template: str, **values: Any) -> str:
    """Return one of this command's templates, filled in."""
    loader = PackageLoader("metalearn.commands.reproduce")
    environment = Environment(loader=loader, trim_blocks=True, undefined=StrictUndefined)
    environment.filters.update(interval=format_interval, published=format_published)
    return environment.get_template(template).render(values).rstrip()


def format_interval(estimate: Row | None) -> str:
    """Format a mean with its 95% interval, which is over seeds unless it says otherwise."""
    if estimate is None:
        return "-"
    over = " (over tasks)" if estimate["over"] == "tasks" else ""
    return f"{MeanCI(estimate['mean'], estimate['ci95'])}{over}"


def format_gain(gain: Row | None) -> str:
    """Format a difference of accuracies with its 95% interval, in points."""
    if gain is None:
        return "-"
    over = " (over tasks)" if gain["over"] == "tasks" else ""
    return f"{format_points(MeanCI(gain['mean'], gain['ci95']))}{over}"


def format_published(reported: Row | None) -> str:
    """Format a published accuracy with its source."""
    return "-" if reported is None else str(Published(**reported))
