"""A run's figures: ``metrics.json``, and the table that ends the command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from metalearn.core import serialization as files
from metalearn.core.profiling.hardware import describe_hardware
from metalearn.core.profiling.memory import MIB
from metalearn.inner import InnerLoop
from metalearn.training.evaluation import Evaluation
from metalearn.training.experiment import Experiment
from metalearn.training.scores import ACCURACY, MSE
from metalearn.training.tracking.meter import Meter


def accuracy_metrics(experiment: Experiment, result: Evaluation) -> dict[str, Any]:
    """What was tested, and how well it did; accuracies are fractions, intervals half-widths."""
    config, name = experiment.config, experiment.score.name
    alone = result.nontransductive
    return {
        "dataset": experiment.dataset,
        "algorithm": config.algorithm.name,
        "backend": config.algorithm.backend,
        "engine": experiment.inner.engine,
        "task_chunk": experiment.inner.task_chunk,
        "snapshot_every": experiment.inner.snapshot_every,
        "precision": config.run.precision,
        "second_order": experiment.inner.second_order,
        "device": device_name(experiment.device),
        "seed": config.run.seed,
        "task": describe_task(experiment),
        "score": name,
        f"test.{name}": result.final.mean,
        "test.ci95": result.final.ci95,
        f"test.{name}_nontransductive": alone.mean if alone else None,
        "test.ci95_nontransductive": alone.ci95 if alone else None,
        "test.episodes": result.episodes,
        "test.queries": config.eval.queries,
        "test.inner_steps": len(result.per_step) - 1,
        f"test.{name}_per_step": [estimate.mean for estimate in result.per_step],
        "test.ci95_per_step": [estimate.ci95 for estimate in result.per_step],
    }


def hparams_metrics(metrics: dict[str, Any]) -> dict[str, float]:
    """What TensorBoard's table of runs compares them by, by tag."""
    return {
        f"test/{metrics['score']}": metrics[f"test.{metrics['score']}"],
        "memory/peak_mib": metrics["memory.peak_mib"],
        "time/median_meta_step_ms": metrics["time.meta_step_ms"],
    }


def describe_task(experiment: Experiment) -> str:
    """Ways and shots; sinusoids have no classes."""
    task = experiment.config.task
    return f"{task.ways}-way {task.shots}-shot" if experiment.score is ACCURACY else f"{task.shots}-shot"


def describe_engine(inner: InnerLoop) -> str:
    """The engine, with what was set beside it."""
    words = [inner.engine]
    words += [f"task_chunk {inner.task_chunk}"] if inner.task_chunk else []
    kept = inner.engine != "unroll" and inner.snapshot_every > 1
    words += [f"snapshot_every {inner.snapshot_every}"] if kept else []
    return ", ".join(words)


def device_name(device: torch.device) -> str:
    """``cpu``, or the GPU's own name behind ``cuda``."""
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def cost_metrics(meter: Meter, *, total_s: float) -> dict[str, Any]:
    """What the run took, in MiB, milliseconds and seconds, and on what machine."""
    return {
        "memory.peak_mib": meter.peak_bytes / MIB,
        "memory.kind": "cuda" if meter.device.type == "cuda" else "cpu-tensors",
        "time.meta_step_ms": meter.meta_step_ms,
        "time.training_s": meter.training_s,
        "time.logging_s": meter.logging_s,
        "time.checkpoint_s": meter.checkpoint_s,
        "time.total_s": total_s,
        **{f"machine.{name}": value for name, value in describe_hardware(meter.device).items()},
    }


def cost_rows(metrics: dict[str, Any]) -> dict[str, str]:
    """The rows of the costs in the closing table."""
    kinds = {"cuda": "CUDA, allocated", "cpu-tensors": "CPU, live tensors in one meta-step"}
    score = ACCURACY if metrics["score"] == ACCURACY.name else MSE
    best, at = metrics[f"validation.best_{score.name}"], metrics["validation.best_iteration"]
    return {
        "best validation": f"{score.text(best)} at meta-step {at}",
        "meta-steps": f"{metrics['iterations']}, {metrics['time.meta_step_ms']:.0f} ms each (median)",
        "peak memory": f"{metrics['memory.peak_mib']:.1f} MiB ({kinds[metrics['memory.kind']]})",
        "total time": f"{metrics['time.total_s'] / 60:.1f} min",
    }


def accuracy_rows(experiment: Experiment, result: Evaluation) -> dict[str, str]:
    """The rows of a test in the closing table."""
    config = experiment.config
    order = "second order" if config.inner.second_order else "first order"
    low = "" if config.run.precision == "float32" else f", {config.run.precision}"
    by = "" if config.algorithm.backend == "metalearn" else f", by {config.algorithm.backend}"
    how = f", {order}, engine {describe_engine(experiment.inner)}"
    if experiment.algorithm.engine or config.algorithm.backend != "metalearn":  # with a gradient of its own
        how = f", {order}" if config.algorithm.name != "reptile" else ""
    elif config.inner.steps == 0:
        how = ""
    score, last = experiment.score, len(result.per_step) - 1
    steps = "  ".join(f"{k}: {score.text(estimate.mean, digits=1)}" for k, estimate in enumerate(result.per_step))
    rows = {
        "task": f"{experiment.dataset}, {describe_task(experiment)}",
        "algorithm": f"{config.algorithm.name}{how}{low}{by}",
        f"test {score.name}": f"{result.final.text(score)} (95% CI, {result.episodes} tasks, {last} inner steps)",
        "after each inner step": steps,
    }
    if result.nontransductive:
        rows["non-transductive"] = f"{result.nontransductive.text(score)} ({describe_protocol(experiment)})"
    return rows


def describe_protocol(experiment: Experiment) -> str:
    """How each query was predicted without the others."""
    kept = (
        "by BatchNorm's statistics in training" if experiment.algorithm.tracks_norm_statistics else "without the others"
    )
    return f"each query predicted {kept}"


def write_metrics(metrics: dict[str, Any], result: Evaluation, run_dir: Path) -> Path:
    """Write ``metrics.json``, flat with dotted names, and before it ``test_tasks.json``, the accuracy of every task."""
    by_task = {
        result.score.name: result.by_task[-1].tolist(),
        f"{result.score.name}_nontransductive": None if result.alone is None else result.alone.tolist(),
    }
    files.atomic_write_text(run_dir / "test_tasks.json", json.dumps(_finite(by_task)) + "\n")
    path = run_dir / "metrics.json"
    files.atomic_write_text(path, json.dumps(_finite(metrics), indent=2) + "\n")
    return path


def _finite(value: Any) -> Any:
    """The same with ``None`` for numbers that JSON has not: NaN and infinity."""
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
