"""The configuration of a small row, and the metrics that its trainings would write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from metalearn.commands.reproduce.plan import build_rows, check_reproduce
from metalearn.commands.reproduce.table import ROTATED
from metalearn.config.commands_schema import ReproduceConfig
from metalearn.config.compose import compose, to_dataclass

ROW = "omniglot_5way_1shot_cpu"
ACCURACIES = (0.98, 0.982, 0.987)


def configuration(*overrides: str) -> ReproduceConfig:
    config = to_dataclass(compose("reproduce", [f"experiment_name={ROW}", *overrides]), ReproduceConfig)
    check_reproduce(config)
    return config


SCORES = {"second": [[1.0, 0.9], [0.9, 0.9], [0.8, 1.0]], "first": [[0.8, 0.9], [0.7, 0.7], [0.7, 0.8]]}
"""Accuracies of two test tasks, by order and seed."""


def finish(config: ReproduceConfig, folder: Path, **changed: Any) -> None:
    """Write the metrics that the trainings and, unless ``rotated=False``, the tests with rotated classes would."""
    rotated = changed.pop("rotated", True)
    for row in build_rows(config, folder):
        for job, accuracy in zip(row.jobs, ACCURACIES, strict=False):
            training = job.config
            job.folder.mkdir(parents=True, exist_ok=True)
            metrics = {
                "dataset": training.data.name,
                "algorithm": "maml",
                "second_order": training.inner.second_order,
                "seed": training.run.seed,
                "task": f"{training.task.ways}-way {training.task.shots}-shot",
                "iterations": training.outer.iterations,
                "test.episodes": 600,
                "test.accuracy": accuracy,
                "test.ci95": 0.001,
                "test.accuracy_nontransductive": accuracy - 0.04,
                "test.ci95_nontransductive": 0.002,
                "test.accuracy_per_step": [0.2, accuracy],
                "validation.best_accuracy": 0.99,
                "validation.best_iteration": 14_000,
                "time.total_s": 600.0 + 60 * training.run.seed,
                "machine.cpu": "a processor",
                "machine.cores": 2,
                "commit": "0123abc",
                **changed,
            }
            (job.folder / "metrics.json").write_text(json.dumps(metrics))
            tasks = SCORES[row.order][job.config.run.seed]
            (job.folder / "test_tasks.json").write_text(json.dumps({"accuracy": tasks}))
            if rotated:
                (job.folder / ROTATED).mkdir(exist_ok=True)
                of_test = {**metrics, "test.accuracy": accuracy - 0.01, "rotate_test": True}
                (job.folder / ROTATED / "metrics.json").write_text(json.dumps(of_test))
