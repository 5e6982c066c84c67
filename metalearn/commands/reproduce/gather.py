"""From the runs of a row to its figures.

The checkpoint that a run tests was chosen on validation classes; nothing here is a mean over models' predictions.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from metalearn.commands.compare.statistics import seed_ci, task_ci
from metalearn.commands.compare.variants import Job
from metalearn.commands.reproduce.plan import TableRow
from metalearn.commands.reproduce.published import published
from metalearn.core.errors import RunError

Metrics = Mapping[str, Any]

_FILE = "metrics.json"


def read_metrics(job: Job) -> Metrics | None:
    """The figures of a finished run; ``None`` if it is not finished.

    Raises:
        RunError: if they cannot be read, or are of another run.
    """
    path = job.folder / _FILE
    if not path.exists():
        return None
    try:
        metrics = json.loads(path.read_text())
        found = {name: metrics[name] for name in _identity(job)}
        metrics["test.accuracy"], metrics["test.ci95"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{path} is not the figures of a finished run ({type(error).__name__}: {error}). Remove the file, and the "
            "same command tests that run again."
        ) from error
    for name, wanted in _identity(job).items():
        if found[name] != wanted:
            raise RunError(
                f"{path} is of another run: its {name} is {found[name]}, and {wanted} is asked for. Take another "
                "folder with hydra.run.dir=PATH, or remove this run's."
            )
    assert isinstance(metrics, dict)
    return metrics


def _identity(job: Job) -> dict[str, Any]:
    config = job.config
    return {
        "dataset": config.data.name,
        "algorithm": config.algorithm.name,
        "second_order": config.inner.second_order,
        "seed": config.run.seed,
        "task": f"{config.task.ways}-way {config.task.shots}-shot",
        "iterations": config.outer.iterations,
        "test.episodes": config.eval.episodes,
    }


def figures(row: TableRow, metrics: Sequence[Metrics]) -> dict[str, Any]:
    """A row as it is recorded: accuracies are fractions, intervals half-widths.

    Args:
        row: settled.
        metrics: of every seed, in order.
    """
    config = row.jobs[0].config
    ways, shots = config.task.ways, config.task.shots
    reported = published(config.algorithm.name, row.order, ways, shots) if config.data.name == "omniglot" else None
    alone = all(m["test.accuracy_nontransductive"] is not None for m in metrics)
    return {
        "experiment": row.experiment,
        "algorithm": config.algorithm.name,
        "order": row.order,
        "dataset": config.data.name,
        "ways": ways,
        "shots": shots,
        "seeds": row.seeds,
        "accuracy": estimate(metrics, "test.accuracy", "test.ci95"),
        "nontransductive": estimate(metrics, "test.accuracy_nontransductive", "test.ci95_nontransductive")
        if alone
        else None,
        "runs": [_run(m) for m in metrics],
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


def estimate(metrics: Sequence[Metrics], mean: str, ci95: str) -> dict[str, Any]:
    """A mean over seeds with its 95% interval, and whether that is over seeds (Student's t) or over the test tasks.

    One seed has the latter alone; of several it is taken where they agree by chance more closely than that.
    """
    halves = [m[ci95] for m in metrics]
    found = seed_ci([m[mean] for m in metrics], halves)
    over = "seeds" if found.ci95 > task_ci(halves) else "tasks"
    return {"mean": found.mean, "ci95": found.ci95, "over": over}


def _run(metrics: Metrics) -> dict[str, Any]:
    return {
        "seed": metrics["seed"],
        "accuracy": metrics["test.accuracy"],
        "ci95": metrics["test.ci95"],
        "nontransductive": metrics["test.accuracy_nontransductive"],
        "nontransductive_ci95": metrics["test.ci95_nontransductive"],
        "accuracy_per_step": metrics["test.accuracy_per_step"],
        "validation": metrics["validation.best_accuracy"],
        "chosen_at": metrics["validation.best_iteration"],
        "minutes": metrics["time.total_s"] / 60,
    }


def hardware_of(metrics: Sequence[Metrics]) -> dict[str, str]:
    """The machine of the runs; every value, where they differ."""
    names = dict.fromkeys(name for m in metrics for name in m if name.startswith("machine."))
    return {
        name.removeprefix("machine."): " / ".join(dict.fromkeys(str(m.get(name)) for m in metrics)) for name in names
    }
