"""Validation, the final test on classes that were never seen, and its repetition from a run's folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from metalearn.config.schema import TrainConfig
from metalearn.core.types import Params
from metalearn.training.checkpoints import load_best
from metalearn.training.evaluation import Evaluation, evaluate
from metalearn.training.experiment import Experiment, build
from metalearn.training.metrics import accuracy_metrics, accuracy_rows, write_metrics
from metalearn.training.runtime.distributed import Ranks
from metalearn.training.scores import ACCURACY
from metalearn.training.tracking.console import print_facts, print_path, progress_bar


def evaluate_together(
    experiment: Experiment,
    params: Params,
    episodes: int,
    *,
    test: bool,
    ranks: Ranks,
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
    best = load_best(run_dir, like=experiment.theta, device=experiment.device)
    episodes = config.eval.episodes
    with experiment.precision(), progress_bar() as progress:
        bar = progress.add_task("test", total=episodes, note="")
        result = evaluate_together(
            experiment,
            best.params,
            episodes,
            test=True,
            ranks=Ranks(),
            progress=lambda done: progress.update(bar, completed=done),
        )
    metrics = {**accuracy_metrics(experiment, result), "checkpoint.iteration": best.iteration, "run.dir": str(run_dir)}
    path = write_metrics(metrics, result, output_dir)
    print_facts(f"Test of the checkpoint at meta-step {best.iteration}", accuracy_rows(experiment, result))
    print_path("Written to", path)
