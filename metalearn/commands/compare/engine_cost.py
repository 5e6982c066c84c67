"""Memory and time of one meta-gradient against the inner steps: first order and every engine, in turns."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

from rich.progress import Progress

from metalearn.commands.benchmark.engines import MeasurementPlan, measure
from metalearn.commands.benchmark.settings import EngineCost
from metalearn.config.commands_schema import CompareSettings
from metalearn.config.schema import TrainConfig
from metalearn.core import serialization as files
from metalearn.core.profiling.hardware import describe_hardware
from metalearn.core.profiling.memory import MIB
from metalearn.inner import InnerLoop
from metalearn.metagrad import ENGINES
from metalearn.training.auto_engine import MetaStepProblem
from metalearn.training.experiment import build_experiment, resolve_device

COST_FILE = "cost.json"


def measure_engine_costs(
    config: TrainConfig, settings: CompareSettings, folder: Path, progress: Progress
) -> list[EngineCost]:
    """Measure, or load what was measured before with the same settings on the same machine."""
    steps = sorted({*settings.steps, *([config.inner.steps] if config.inner.steps else [])})
    conditions = {
        "machine": describe_hardware(resolve_device(config.run.device)),
        "precision": config.run.precision,
        "task": asdict(config.task),
        "model": asdict(config.model),
        "lr": config.inner.lr,
        "steps": steps,
        "rounds": settings.repeats,
        "limit_mib": settings.memory_limit_mib,
    }
    path = folder / COST_FILE
    if path.exists():
        content = json.loads(path.read_text())
        saved = content.pop("rows")
        if content == conditions:
            return [EngineCost(**{**row, "quartiles_ms": (q := row["quartiles_ms"]) and tuple(q)}) for row in saved]
    experiment = build_experiment(config)
    problem = MetaStepProblem(experiment.forward, experiment.theta, experiment.train.batch(0, config.task.meta_batch))
    limit = int(settings.memory_limit_mib * MIB)
    plan = MeasurementPlan("memory and time against K", steps, steps, settings.repeats, limit)
    with experiment.precision():
        rows = measure(problem, lambda k: compared_inner_loops(config.inner.lr, k), plan, progress)
    files.atomic_write_json(path, {**conditions, "rows": [asdict(row) for row in rows]})
    return rows


def compared_inner_loops(lr: float, steps: int) -> list[InnerLoop]:
    """Return first order, which is the same for every engine, and second order by each."""
    base = InnerLoop(lr=lr, steps=steps)
    return [replace(base, second_order=False), *(replace(base, engine=engine) for engine in ENGINES)]
