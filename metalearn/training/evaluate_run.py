"""Validation and test of a run, ``metrics.json``, and the summary table that ends a command."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from metalearn.config.options import OmniglotConfig
from metalearn.config.schema import TaskConfig, TrainConfig
from metalearn.core import serialization as files
from metalearn.core.profiling.hardware import checkout_commit, describe_hardware
from metalearn.core.profiling.memory import MIB
from metalearn.core.text import format_duration, plural
from metalearn.core.types import Params
from metalearn.training.checkpoints import load_best
from metalearn.training.evaluation import ACCURACY, MSE, Evaluation, MeanCI, Metric, evaluate
from metalearn.training.experiment import Experiment, build_experiment
from metalearn.training.runtime.distributed import DistributedContext
from metalearn.training.tracking.console import print_path, print_summary, progress_bar
from metalearn.training.tracking.meter import Meter


def evaluate_distributed(
    experiment: Experiment,
    params: Params,
    episodes: int,
    *,
    test: bool,
    ranks: DistributedContext,
    progress: Callable[[int], None],
) -> Evaluation:
    """Evaluate on validation or test tasks; the accuracy of a test by both BatchNorm protocols.

    Every process takes a shard of the tasks, and calls ``progress`` with the number of tasks that it has done.
    """
    shard = ranks.shard(episodes)
    local = evaluate(
        experiment.forward,
        params,
        experiment.test if test else experiment.validation,
        experiment.eval_inner,
        first=shard.start,
        episodes=len(shard),
        batch=experiment.eval_batch,
        nontransductive=test and experiment.metric is ACCURACY,
        metric=experiment.metric,
        progress=progress,
    )
    nontransductive = local.nontransductive_scores
    return Evaluation(
        ranks.all_gather(local.scores),
        None if nontransductive is None else ranks.all_gather(nontransductive),
        experiment.metric,
    )


def evaluate_run(config: TrainConfig, run_dir: Path, output_dir: Path) -> None:
    """Test a run's best checkpoint again and write ``metrics.json`` into ``output_dir``.

    ``config`` is the run's own, possibly with another device and number of tasks.
    """
    experiment = build_experiment(config)
    best = load_best(run_dir, like=experiment.theta, device=experiment.device)
    episodes = config.eval.episodes
    with experiment.precision(), progress_bar() as progress:
        bar = progress.add_task("test", total=episodes, note="")
        result = evaluate_distributed(
            experiment,
            best.params,
            episodes,
            test=True,
            ranks=DistributedContext(),
            progress=lambda done: progress.update(bar, completed=done),
        )
    metrics = {**accuracy_metrics(experiment, result), "checkpoint.iteration": best.iteration, "run.dir": str(run_dir)}
    path = write_metrics(metrics, result, output_dir)
    print_summary(f"Test of the checkpoint at meta-step {best.iteration}", accuracy_rows(experiment, result))
    print_path("Written to", path)


def accuracy_metrics(experiment: Experiment, result: Evaluation) -> dict[str, Any]:
    """Return a test's settings and scores for ``metrics.json``; accuracies are fractions, intervals half-widths."""
    config, inner, name = experiment.config, experiment.inner, experiment.metric.name
    nontransductive, device = result.nontransductive, experiment.device
    return {
        "dataset": experiment.dataset,
        "algorithm": config.algorithm.label,
        "backend": config.algorithm.backend,
        "engine": inner.engine,
        "task_chunk": inner.task_chunk,
        "snapshot_every": inner.checkpoint_every,
        "precision": config.run.precision,
        "second_order": inner.second_order,
        "device": f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device),
        "seed": config.run.seed,
        "task": _describe_task(config.task, experiment.metric),
        "rotate_test": _rotates_test(config),
        "score": name,
        f"test.{name}": result.final.mean,
        "test.ci95": result.final.ci95,
        f"test.{name}_nontransductive": nontransductive.mean if nontransductive else None,
        "test.ci95_nontransductive": nontransductive.ci95 if nontransductive else None,
        "test.episodes": result.episodes,
        "test.queries": config.eval.queries,
        "test.inner_steps": len(result.per_step) - 1,
        f"test.{name}_per_step": [estimate.mean for estimate in result.per_step],
        "test.ci95_per_step": [estimate.ci95 for estimate in result.per_step],
    }


def cost_metrics(meter: Meter, *, total_s: float) -> dict[str, Any]:
    """Return a training's memory (MiB), times (ms, s), hardware and commit for ``metrics.json``."""
    return {
        "memory.peak_mib": meter.peak_bytes / MIB,
        "memory.kind": "cuda" if meter.device.type == "cuda" else "cpu-tensors",
        "time.meta_step_ms": meter.meta_step_ms,
        "time.training_s": meter.training_s,
        "time.logging_s": meter.logging_s,
        "time.checkpoint_s": meter.checkpoint_s,
        "time.total_s": total_s,
        **{f"machine.{name}": value for name, value in describe_hardware(meter.device).items()},
        "commit": checkout_commit(),
    }


def hparams_metrics(metrics: dict[str, Any]) -> dict[str, float]:
    """Return the metrics that TensorBoard's table of runs compares, by tag."""
    return {
        f"{metrics['score']}/test": metrics[f"test.{metrics['score']}"],
        "cost/peak_mib": metrics["memory.peak_mib"],
        "cost/median_meta_step_ms": metrics["time.meta_step_ms"],
    }


def format_test(metrics: Mapping[str, Any]) -> str:
    """Return the test score in ``metrics.json`` with its interval, as ``accuracy 97.31% ± 0.42%``."""
    metric = ACCURACY if metrics["score"] == ACCURACY.name else MSE
    return f"{metric.name} {MeanCI(metrics[f'test.{metric.name}'], metrics['test.ci95']).format(metric)}"


def write_metrics(metrics: dict[str, Any], result: Evaluation, run_dir: Path) -> Path:
    """Write ``test_tasks.json``, the score of every task, then ``metrics.json``, flat with dotted names."""
    name, nontransductive = result.metric.name, result.nontransductive_scores
    tasks = {
        name: result.scores[-1].tolist(),
        f"{name}_nontransductive": None if nontransductive is None else nontransductive.tolist(),
    }
    files.atomic_write_text(run_dir / "test_tasks.json", json.dumps(_nonfinite_to_none(tasks)) + "\n")
    path = run_dir / "metrics.json"
    files.atomic_write_text(path, json.dumps(_nonfinite_to_none(metrics), indent=2) + "\n")
    return path


def _nonfinite_to_none(value: Any) -> Any:
    """Replace NaN and infinity, which JSON lacks, by ``None``."""
    if isinstance(value, dict):
        return {name: _nonfinite_to_none(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_nonfinite_to_none(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def accuracy_rows(experiment: Experiment, result: Evaluation) -> dict[str, str]:
    """Return the test's rows of the summary table."""
    config, metric, last = experiment.config, experiment.metric, len(result.per_step) - 1
    precision = "" if config.run.precision == "float32" else f", {config.run.precision}"
    backend = "" if config.algorithm.backend == "metalearn" else f", by {config.algorithm.backend}"
    steps = "  ".join(f"{k}: {metric.format(estimate.mean, digits=1)}" for k, estimate in enumerate(result.per_step))
    rows = {
        "task": f"{experiment.dataset}, {_describe_task(config.task, metric)}"
        + (", rotated test classes" if _rotates_test(config) else ""),
        "algorithm": f"{config.algorithm.label}{_describe_engine(experiment)}{precision}{backend}",
        f"test {metric.name}": f"{result.final.format(metric)} "
        f"(95% CI, {result.episodes} tasks, {plural(last, 'inner step')})",
        "after each inner step": steps,
    }
    if result.nontransductive:
        tracked = experiment.algorithm.tracks_norm_statistics
        how = "by BatchNorm's statistics in training" if tracked else "without the others"
        rows["non-transductive"] = f"{result.nontransductive.format(metric)} (each query predicted {how})"
    return rows


def cost_rows(metrics: dict[str, Any]) -> dict[str, str]:
    """Return the training's rows of the summary table."""
    kinds = {"cuda": "CUDA, allocated", "cpu-tensors": "CPU, live tensors in one meta-step"}
    metric = ACCURACY if metrics["score"] == ACCURACY.name else MSE
    best, at = metrics[f"validation.best_{metric.name}"], metrics["validation.best_iteration"]
    return {
        "best validation": f"{metric.format(best)} at meta-step {at}",
        "meta-steps": f"{metrics['iterations']}, {metrics['time.meta_step_ms']:.0f} ms each (median)",
        "peak memory": f"{metrics['memory.peak_mib']:.1f} MiB ({kinds[metrics['memory.kind']]})",
        "total time": format_duration(metrics["time.total_s"]),
    }


def _rotates_test(config: TrainConfig) -> bool:
    return isinstance(config.data, OmniglotConfig) and config.data.rotate_test


def _describe_task(task: TaskConfig, metric: Metric) -> str:
    """Return ways and shots; sinusoids have no classes."""
    return f"{task.ways}-way {task.shots}-shot" if metric is ACCURACY else f"{task.shots}-shot"


def _describe_engine(experiment: Experiment) -> str:
    """Return the order of the meta-gradient and the engine with its settings, where they matter."""
    config, inner = experiment.config, experiment.inner
    order = "second order" if config.inner.second_order else "first order"
    if experiment.algorithm.engine or config.algorithm.backend != "metalearn":  # its own meta-gradient
        return f", {order}" if config.algorithm.name != "reptile" else ""
    if config.inner.steps == 0:
        return ""
    settings = [f"engine {inner.engine}"]
    settings += [f"task_chunk {inner.task_chunk}"] if inner.task_chunk else []
    if inner.engine != "unroll" and inner.checkpoint_every > 1:
        settings.append(f"checkpoint_every {inner.checkpoint_every}")
    return f", {order}, {', '.join(settings)}"
