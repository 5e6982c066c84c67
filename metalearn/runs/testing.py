"""The final test on classes that were never seen, and its repetition from a run's folder."""

from __future__ import annotations

from pathlib import Path

from rich.progress import Progress

from metalearn.runs.checkpoints import best_path, load_checkpoint
from metalearn.runs.console import print_facts, print_path, progress_bar
from metalearn.runs.evaluation import Evaluation, evaluate
from metalearn.runs.experiment import Experiment, build
from metalearn.runs.metrics import accuracy_metrics, accuracy_rows, write_metrics
from metalearn.runs.schema import TrainConfig
from metalearn.types import Params


def final_test(experiment: Experiment, params: Params, episodes: int, progress: Progress) -> Evaluation:
    """Accuracy on ``episodes`` tasks of test classes, by both BatchNorm protocols."""
    bar = progress.add_task("test", total=episodes, note="")
    return evaluate(
        experiment.forward,
        params,
        experiment.test,
        experiment.eval_inner,
        episodes=episodes,
        batch=experiment.eval_batch,
        nontransductive=True,
        progress=lambda done: progress.update(bar, completed=done),
    )


def retest(config: TrainConfig, run_dir: Path, output_dir: Path) -> None:
    """Test a run's best checkpoint again; writes ``metrics.json`` into ``output_dir``.

    Args:
        config: the run's own, with the device and number of tasks that are wanted now.
        run_dir: where it was trained.
        output_dir: a folder of this test's own.

    Raises:
        RunError: if the checkpoint is missing or damaged.
    """
    experiment = build(config)
    best = load_checkpoint(best_path(run_dir), like=experiment.theta, device=experiment.device)
    with experiment.precision(), progress_bar() as progress:
        result = final_test(experiment, best.params, config.eval.episodes, progress)
    metrics = {**accuracy_metrics(experiment, result), "checkpoint.iteration": best.iteration, "run.dir": str(run_dir)}
    path = write_metrics(metrics, result, output_dir)
    print_facts(f"Test of the checkpoint at meta-step {best.iteration}", accuracy_rows(experiment, result))
    print_path("Written to", path)
