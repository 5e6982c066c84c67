"""A run's figures: ``metrics.json``, and the table that ends the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from metalearn import files
from metalearn.inner import InnerLoop
from metalearn.live_bytes import MIB
from metalearn.runs.evaluation import Evaluation
from metalearn.runs.experiment import Experiment
from metalearn.runs.machine import machine
from metalearn.runs.meter import Meter


def accuracy_metrics(experiment: Experiment, result: Evaluation) -> dict[str, Any]:
    """What was tested, and how well it did; accuracies are fractions, intervals half-widths."""
    config = experiment.config
    alone = result.nontransductive
    return {
        "dataset": experiment.dataset,
        "algorithm": config.algorithm.name,
        "engine": experiment.inner.engine,
        "task_chunk": experiment.inner.task_chunk,
        "snapshot_every": experiment.inner.snapshot_every,
        "precision": config.run.precision,
        "second_order": config.inner.second_order,
        "device": device_name(experiment.device),
        "seed": config.run.seed,
        "task": f"{config.task.ways}-way {config.task.shots}-shot",
        "test.accuracy": result.accuracy.mean,
        "test.ci95": result.accuracy.ci95,
        "test.accuracy_nontransductive": alone.mean if alone else None,
        "test.ci95_nontransductive": alone.ci95 if alone else None,
        "test.episodes": result.episodes,
        "test.queries": config.eval.queries,
        "test.inner_steps": len(result.per_step) - 1,
        "test.accuracy_per_step": [estimate.mean for estimate in result.per_step],
        "test.ci95_per_step": [estimate.ci95 for estimate in result.per_step],
    }


def hparams_metrics(metrics: dict[str, Any]) -> dict[str, float]:
    """What TensorBoard's table of runs compares them by, by tag."""
    return {
        "test/accuracy": metrics["test.accuracy"],
        "memory/peak_mib": metrics["memory.peak_mib"],
        "time/median_meta_step_ms": metrics["time.meta_step_ms"],
    }


def engine_in_words(inner: InnerLoop) -> str:
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
        **{f"machine.{name}": value for name, value in machine(meter.device).items()},
    }


def cost_rows(metrics: dict[str, Any]) -> dict[str, str]:
    """The rows of the costs in the closing table."""
    kinds = {"cuda": "CUDA, allocated", "cpu-tensors": "CPU, live tensors in one meta-step"}
    best, at = metrics["validation.best_accuracy"], metrics["validation.best_iteration"]
    return {
        "best validation": f"{best:.2%} at meta-step {at}",
        "meta-steps": f"{metrics['iterations']}, {metrics['time.meta_step_ms']:.0f} ms each (median)",
        "peak memory": f"{metrics['memory.peak_mib']:.1f} MiB ({kinds[metrics['memory.kind']]})",
        "total time": f"{metrics['time.total_s'] / 60:.1f} min",
    }


def accuracy_rows(experiment: Experiment, result: Evaluation) -> dict[str, str]:
    """The rows of a test in the closing table."""
    config = experiment.config
    order = "second order" if config.inner.second_order else "first order"
    low = "" if config.run.precision == "float32" else f", {config.run.precision}"
    steps = "  ".join(f"{k}: {estimate.mean:.1%}" for k, estimate in enumerate(result.per_step))
    rows = {
        "task": f"{experiment.dataset}, {config.task.ways}-way {config.task.shots}-shot",
        "algorithm": f"{config.algorithm.name}, {order}, engine {engine_in_words(experiment.inner)}{low}",
        "test accuracy": f"{result.accuracy} (95% CI, {result.episodes} tasks, {len(result.per_step) - 1} inner steps)",
        "after each inner step": steps,
    }
    if result.nontransductive:
        rows["non-transductive"] = f"{result.nontransductive} (each query predicted without the others)"
    return rows


def write_metrics(metrics: dict[str, Any], result: Evaluation, run_dir: Path) -> Path:
    """Write ``metrics.json``, flat with dotted names, and before it ``test_tasks.json``, the accuracy of every task."""
    by_task = {
        "accuracy": result.by_task[-1].tolist(),
        "accuracy_nontransductive": None if result.alone is None else result.alone.tolist(),
    }
    files.write_text(run_dir / "test_tasks.json", json.dumps(by_task) + "\n")
    path = run_dir / "metrics.json"
    files.write_text(path, json.dumps(metrics, indent=2) + "\n")
    return path
