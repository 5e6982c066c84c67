"""Validation, the final test on classes that were never seen, and its repetition from a run's folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from metalearn.config.schema import TrainConfig
from metalearn.core.types import Params
from metalearn.training.checkpoints import load_best
from metalearn.training.evaluation import Evaluation, evaluate
from metalearn.training.experiment import Experiment, build_experiment
from metalearn.training.metrics import accuracy_metrics, accuracy_rows, write_metrics
from metalearn.training.runtime.distributed import DistributedContext
from metalearn.training.scores import ACCURACY
from metalearn.training.tracking.console import print_path, print_summary, progress_bar


def evaluate_distributed(
    experiment: Experiment,
    params: Params,
    episodes: int,
    *,
    test: bool,
    ranks: DistributedContext,
    progress: Callable[[int], None],
) -> Evaluation:
    """Scores on validation tasks, or on those of the test; accuracy there by both BatchNorm protocols.

    Args:
        experiment: what to compute with.
        params: meta-parameters.
        episodes: number of tasks.
        test: whether on test classes.
        ranks: the processes, each of which takes a share of the tasks.
        progress: called with the number of tasks that this process has done.

    Raises:
        LostProcessError: if a process is gone.
    """
    share = ranks.share(episodes)
    own = evaluate(
        experiment.forward,
        params,
        experiment.test if test else experiment.validation,
        experiment.eval_inner,
        first=share.start,
        episodes=len(share),
        batch=experiment.eval_batch,
        nontransductive=test and experiment.score is ACCURACY,
        score=experiment.score,
        progress=progress,
    )
    alone = None if own.alone is None else ranks.join(own.alone)
    return Evaluation(ranks.join(own.by_task), alone, own.score)


def evaluate_run(config: TrainConfig, run_dir: Path, output_dir: Path) -> None:
    """Test a run's best checkpoint again; writes ``metrics.json`` into ``output_dir``.

    Args:
        config: the run's own, with the device and number of tasks that are wanted now.
        run_dir: where it was trained.
        output_dir: a folder of this test's own.

    Raises:
        RunError: if the checkpoint is missing or damaged.
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
