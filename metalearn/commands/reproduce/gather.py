"""Compute a row's results from the metrics of its runs.

The checkpoint that a run tests was chosen on validation classes; nothing here is a mean over models' predictions.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from metalearn.commands.compare.gather import hardware_of
from metalearn.commands.compare.statistics import seed_ci, task_ci
from metalearn.commands.compare.variants import Job
from metalearn.commands.reproduce.plan import TableRow, published
from metalearn.core.errors import RunError

Metrics = Mapping[str, Any]


def read_metrics(job: Job) -> Metrics | None:
    """Return the metrics of a finished run; ``None`` if it is not finished.

    Raises:
        RunError: if they cannot be read, or are those of another run.
    """
    path = job.folder / "metrics.json"
    if not path.exists():
        return None
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
    try:
        metrics: Metrics = json.loads(path.read_text())
        found = {name: metrics[name] for name in (*expected, "test.accuracy", "test.ci95")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{path} does not hold the metrics of a finished run ({type(error).__name__}: {error}). Remove the file, "
            "and the same command tests that run again."
        ) from error
    for name, value in expected.items():
        if found[name] != value:
            raise RunError(
                f"{path} is of another run: its {name} is {found[name]}, but {value} is requested. Use another "
                "folder with hydra.run.dir=PATH, or remove this run's."
            )
    return metrics


def row_results(row: TableRow, metrics: Sequence[Metrics]) -> dict[str, Any]:
    """Return a row as it is saved: accuracies are fractions, intervals half-widths.

    Args:
        row: resolved.
        metrics: of every seed, in order.
    """
    config = row.jobs[0].config
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
        "runs": [
            {
                "seed": m["seed"],
                "accuracy": m["test.accuracy"],
                "ci95": m["test.ci95"],
                "nontransductive": m["test.accuracy_nontransductive"],
                "nontransductive_ci95": m["test.ci95_nontransductive"],
                "accuracy_per_step": m["test.accuracy_per_step"],
                "validation": m["validation.best_accuracy"],
                "chosen_at": m["validation.best_iteration"],
                "minutes": m["time.total_s"] / 60,
            }
            for m in metrics
        ],
        "test_tasks": config.eval.episodes,
        "inner_steps": config.inner.steps,
        "test_inner_steps": config.inner.eval_steps,
        "iterations": config.outer.iterations,
        "tasks_per_step": config.task.meta_batch,
        "minutes": statistics.fmean(m["time.total_s"] for m in metrics) / 60,
        "machine": hardware_of(metrics),
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
