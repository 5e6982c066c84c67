"""Memory and time of one meta-gradient against the number of inner steps: first order, and every engine.

All take turns in one process, on the first batch of the comparison's own tasks, so that a machine whose speed drifts
treats them alike.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.progress import Progress

from metalearn.commands.benchmark.engine_settings import EngineCost
from metalearn.commands.benchmark.engines import MeasurementPlan, measure
from metalearn.config.commands_schema import CompareSettings
from metalearn.config.schema import TrainConfig
from metalearn.core import serialization as files
from metalearn.core.profiling.hardware import describe_hardware
from metalearn.core.profiling.memory import MIB
from metalearn.inner import InnerLoop
from metalearn.metagrad import ENGINES
from metalearn.training.auto_engine import MetaStepProblem
from metalearn.training.experiment import build_experiment, resolve_device

FILE = "cost.json"


def measure_engine_costs(
    config: TrainConfig, settings: CompareSettings, folder: Path, progress: Progress
) -> list[EngineCost]:
    """Measure, or read what was measured with the same settings on the same machine before.

    Args:
        config: whose tasks, model and inner step size are taken.
        settings: at which K, how often, and up to how much memory.
        folder: where ``measure_engine_costs.json`` is kept.
        progress: for a bar.
    """
    steps = sorted({*settings.steps, *([config.inner.steps] if config.inner.steps else [])})
    setting = {
        "machine": describe_hardware(resolve_device(config.run.device)),
        "task": asdict(config.task),
        "model": asdict(config.model),
        "precision": config.run.precision,
        "lr": config.inner.lr,
        "steps": steps,
        "rounds": settings.repeats,
        "limit_mib": settings.memory_limit_mib,
    }
    if kept := _kept(folder / FILE, setting):
        return kept
    experiment = build_experiment(config)
    problem = MetaStepProblem(experiment.forward, experiment.theta, experiment.train.batch(0, config.task.meta_batch))
    grid = MeasurementPlan(
        "memory and time against K", steps, steps, settings.repeats, int(settings.memory_limit_mib * MIB)
    )
    with experiment.precision():
        rows = measure(problem, lambda k: compared_inner_loops(config.inner.lr, k), grid, progress)
    content = {**setting, "rows": [asdict(row) for row in rows]}
    files.atomic_write_text(folder / FILE, json.dumps(content, indent=2) + "\n")
    return rows


def compared_inner_loops(lr: float, steps: int) -> list[InnerLoop]:
    """First order, which is the same for every engine, and second order by each."""
    base = InnerLoop(lr=lr, steps=steps)
    return [replace(base, second_order=False), *(replace(base, engine=engine) for engine in ENGINES)]


def _kept(path: Path, setting: dict[str, Any]) -> list[EngineCost] | None:
    if not path.exists():
        return None
    content = json.loads(path.read_text())
    rows = content.pop("rows")
    return [_row(row) for row in rows] if content == setting else None


def _row(content: dict[str, Any]) -> EngineCost:
    quartiles = content["quartiles_ms"]
    return EngineCost(**{**content, "quartiles_ms": tuple(quartiles) if quartiles else None})
