"""A training from beginning to end: its folder, the outer loop, and one test of the best parameters.

The parameters with the best validation accuracy are those that are tested. Under ``torchrun`` the first process owns
the folder, logs and saves; the others follow it.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from pathlib import Path
from typing import Any, NamedTuple

from metalearn.config.run_config import changed_keys, to_yaml
from metalearn.config.run_folder import folder_lock
from metalearn.config.schema import TrainConfig, result_keys
from metalearn.core.errors import ConfigError, RunError
from metalearn.core.profiling.allocator import configure_malloc
from metalearn.training.auto_engine import resolve_auto_engine
from metalearn.training.evaluation import Evaluation
from metalearn.training.experiment import Experiment, build_experiment, training_device, with_inner_config
from metalearn.training.loop import save_on_exit, train_loop
from metalearn.training.metrics import (
    accuracy_metrics,
    accuracy_rows,
    cost_metrics,
    cost_rows,
    hparams_metrics,
    write_metrics,
)
from metalearn.training.resume import RunStatus, open_run, restore_run
from metalearn.training.runtime.distributed import DistributedContext, init_distributed
from metalearn.training.runtime.precision import check_precision
from metalearn.training.runtime.signals import StopRequest
from metalearn.training.saver import Checkpointer
from metalearn.training.session import TrainContext
from metalearn.training.state import BestCheckpoint, TrainState
from metalearn.training.tracking.console import print_path, print_summary, progress_bar
from metalearn.training.tracking.images import save_sinusoid_plot
from metalearn.training.tracking.meter import Meter
from metalearn.training.tracking.tensorboard import TensorBoardLogger

log = logging.getLogger(__name__)


class BroadcastState(NamedTuple):
    """What the first process tells the others before the first meta-step.

    Args:
        run_dir: the run's folder.
        config: with the engine that ``auto`` was settled to, and the data set that is really there.
        state: as ``TrainState.content`` gives it, so that all begin with the same bits.
    """

    run_dir: Path
    config: TrainConfig
    state: dict[str, Any]


def train(config: TrainConfig, run_dir: Path) -> None:
    """Train, validate, and test the best checkpoint; write everything into ``run_dir``.

    Args:
        config: checked, with the data set that is really there, and the engine of a run that goes on.
        run_dir: a folder that holds no other run, or, with ``run.resume``, this one's.

    Raises:
        FolderTakenError: if the folder holds another run.
        StoppedError: if the process was asked to end; the run can go on.
        RunError: if a loss, gradient or parameter is not finite, memory runs out, another process of the run is gone,
            or every checkpoint is damaged.
        ConfigError: if the device is not there, or has no TF32 where ``run.precision`` asks for it.
        DataError: if the data set is missing or damaged.
    """
    started = time.perf_counter()
    configure_malloc()
    with init_distributed(training_device(config)) as ranks:
        check_tasks_per_process(config, ranks)
        experiment = resolve_auto_engine(build_experiment(config))
        built = time.perf_counter()
        with folder_lock(run_dir, wait=config.run.resume is not False), StopRequest() as stop:
            started += time.perf_counter() - built  # waiting for another process is not this run's time
            opened = open_run(experiment.config, run_dir)
            if opened.finished:
                log.info("This run is finished: %s", run_dir)
                ranks.broadcast(None)
                return
            _train_main(experiment, opened, ranks, stop, began=started - opened.total_s)


def train_worker(config: TrainConfig) -> None:
    """Be one of the other processes of a training: the same meta-steps, and nothing written.

    Raises:
        As ``train`` does.
    """
    with init_distributed(training_device(config)) as ranks:
        check_tasks_per_process(config, ranks)
        experiment = build_experiment(config)
        start: BroadcastState | None = ranks.broadcast(None)
        if start is None:
            return
        check_same_config(config, start.config, ranks)
        experiment = with_inner_config(experiment, start.config.inner)
        state = TrainState.start(experiment.theta, experiment.config.outer)
        state.restore(start.state)
        with StopRequest() as stop, experiment.precision(), progress_bar(shown=False) as progress:
            meter = Meter(experiment.device)
            session = TrainContext(experiment, start.run_dir, meter, stop, progress, ranks, saver=None)
            with save_on_exit(session, state):
                train_loop(session, state)
                session.evaluate(_best(state).params, test=True)


def check_tasks_per_process(config: TrainConfig, ranks: DistributedContext) -> None:
    """Refuse more processes than there are tasks to share.

    Raises:
        ConfigError: naming the key.
    """
    settings = config.eval
    for name, tasks in (
        ("task.meta_batch", config.task.meta_batch),
        ("eval.validation_episodes", settings.validation_episodes),
        ("eval.episodes", settings.episodes),
    ):
        if tasks < ranks.size:
            raise ConfigError(
                f"{name}={tasks}: {ranks.size} processes share these tasks; take as many, or fewer processes"
            )


def check_same_config(own: TrainConfig, first: TrainConfig, ranks: DistributedContext) -> None:
    """Refuse to share tasks with a process that trains on something else, as where one machine lacks the data set.

    Raises:
        RunError: naming every key that differs.
    """
    settled = dataclasses.replace(own, inner=first.inner) if own.inner.engine == "auto" else own
    here, there = result_keys(settled), result_keys(first)
    if names := changed_keys(here, there):
        raise RunError(
            f"process {ranks.rank} would train on something else than the first:\n"
            + "\n".join(f"{name}: {here.get(name)} here, {there.get(name)} in the first" for name in names)
            + "\nGive every machine the same data set and command; data.fallback=null stops where it is missing."
        )


def _train_main(
    experiment: Experiment, opened: RunStatus, ranks: DistributedContext, stop: StopRequest, *, began: float
) -> None:
    config, run_dir = experiment.config, opened.run_dir
    log.info("Training on %s, device %s", experiment.dataset, experiment.device)
    print_path("Run folder", run_dir)
    verify_precision(experiment)
    state, meter = TrainState.start(experiment.theta, config.outer), Meter(experiment.device)
    earlier = restore_run(state, meter, opened, config)
    ranks.broadcast(BroadcastState(run_dir, config, state.content()))
    config_yaml = to_yaml(config)
    with (
        experiment.precision(),
        TensorBoardLogger(
            run_dir,
            config=config_yaml,
            resumed_at=state.iteration if opened.begun else None,
            position=opened.position,
            aside=earlier if opened.tested else None,
        ) as tracker,
        progress_bar() as progress,
    ):
        saver = Checkpointer(run_dir, config_yaml, meter, tracker, config.run.checkpoint_every_s, began)
        session = TrainContext(experiment, run_dir, meter, stop, progress, ranks, saver)
        with save_on_exit(session, state):
            train_loop(session, state)
            result = session.evaluate(_best(state).params, test=True)
        metrics = _metrics(session, state, result, saver.total_s)
        tracker.test(result, metrics["validation.best_iteration"])
        tracker.hparams(result_keys(config), hparams_metrics(metrics), state.iteration)
    write_metrics(metrics, result, run_dir)
    with experiment.precision():
        if path := save_sinusoid_plot(experiment, _best(state).params, run_dir):
            print_path("Picture", path)
    print_summary("Summary", {**accuracy_rows(experiment, result), **cost_rows(metrics)})
    print_path("Run folder", run_dir)


def _best(state: TrainState) -> BestCheckpoint:
    assert state.best is not None, "the last meta-step is followed by validation"
    return state.best


def _metrics(session: TrainContext, state: TrainState, result: Evaluation, total_s: float) -> dict[str, Any]:
    best = _best(state)
    return {
        **accuracy_metrics(session.experiment, result),
        "processes": session.ranks.size,
        "iterations": state.iteration,
        "iterations.skipped": state.skipped,
        f"validation.best_{session.experiment.score.name}": best.validation_score,
        "validation.best_iteration": best.iteration,
        **cost_metrics(session.meter, total_s=total_s),
    }


def verify_precision(experiment: Experiment) -> None:
    """Compare the first meta-gradient with float32's, if the run computes with less.

    Raises:
        RunError: if rounding takes away what the second-order term would give.
    """
    precision = experiment.config.run.precision
    if precision != "float32":
        batch = experiment.train.batch(0, experiment.config.task.meta_batch)
        report = check_precision(
            *(experiment.forward, experiment.theta, batch, experiment.inner),
            precision=precision,
            loss=experiment.score.loss,
            engine=experiment.algorithm.engine,
        )
        log.info("%s", report)
