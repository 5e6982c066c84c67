"""A training from start to finish: open the folder, run the training loop, test the best parameters.

The parameters with the best validation score are tested. Under ``torchrun`` the main process owns the folder, logs and
saves; the others are workers.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path
from traceback import clear_frames
from typing import Any, NamedTuple

from metalearn.config.run_config import changed_keys, to_yaml
from metalearn.config.schema import TrainConfig, result_keys
from metalearn.core.errors import ConfigError, MetalearnError, RunError, TerminatedError, is_out_of_memory
from metalearn.core.profiling.hardware import checkout_commit, configure_malloc
from metalearn.core.text import first_line
from metalearn.training.auto_engine import choose_kernels, resolve_auto_engine
from metalearn.training.checkpoints import Checkpointer
from metalearn.training.evaluate_run import (
    accuracy_metrics,
    accuracy_rows,
    cost_metrics,
    cost_rows,
    hparams_metrics,
    write_metrics,
)
from metalearn.training.evaluation import Evaluation
from metalearn.training.experiment import Experiment, build_experiment, training_device, with_config
from metalearn.training.failures import DivergedError, explain_out_of_memory
from metalearn.training.loop import TrainContext, train_loop
from metalearn.training.resume import RunStatus, open_run, restore_run
from metalearn.training.run_folder import folder_lock, is_part_of_more
from metalearn.training.runtime import torchrun
from metalearn.training.runtime.distributed import DistributedContext, init_distributed
from metalearn.training.runtime.precision import check_precision
from metalearn.training.runtime.signals import StopRequest, terminated_by
from metalearn.training.runtime.threads import ThreadTuner
from metalearn.training.state import BestCheckpoint, TrainState
from metalearn.training.step import local_tasks
from metalearn.training.tracking.console import print_path, print_summary, progress_bar
from metalearn.training.tracking.curvature import has_curvature
from metalearn.training.tracking.images import save_sinusoid_plot
from metalearn.training.tracking.meter import Meter
from metalearn.training.tracking.tensorboard import TensorBoardLogger, build_layout, experiment_summary

log = logging.getLogger(__name__)


class BroadcastState(NamedTuple):
    """Sent by the main process to the workers, so that all begin with the same settings and the same bits."""

    run_dir: Path
    config: TrainConfig
    state: dict[str, Any]
    kernels_on_gpus: bool


def train(config: TrainConfig, run_dir: Path) -> None:
    """Train, validate, and test the best checkpoint; write everything into ``run_dir``.

    Args:
        config: validated, with the data set resolved, and the engine of a run that is resumed.
        run_dir: a folder that holds no other run, or, with ``run.resume``, this one.

    Raises:
        RunExistsError: if the folder holds another run.
        TerminatedError: if a signal has asked the process to stop; the run can be resumed.
        RunError: if a loss, gradient or parameter is not finite, memory runs out, another process of the run is gone,
            every checkpoint is damaged, or ``run.init_from`` cannot be used.
        ConfigError: if the device does not exist, or has no TF32 where ``run.precision`` asks for it.
        DataError: if the data set is missing or damaged.
    """
    started_at = time.perf_counter()
    configure_malloc()
    checkout_commit()  # of the code that trains, not of what lies there when it ends
    check_tasks_per_process(config, torchrun.world_size())
    with init_distributed(training_device(config)) as ranks:
        experiment = resolve_auto_engine(build_experiment(config))
        built_at = time.perf_counter()
        with folder_lock(run_dir, wait=config.run.resume is not False), StopRequest() as stop:
            started_at += time.perf_counter() - built_at  # waiting for the lock is not this run's time
            status = open_run(experiment.config, run_dir, theta=experiment.theta, device=experiment.device)
            if status.is_finished:
                log.info("This run is finished: %s", run_dir)
                ranks.broadcast(None)
                return
            _train_main(experiment, status, ranks, stop, started_at=started_at - status.total_s)


def _train_main(
    experiment: Experiment, status: RunStatus, ranks: DistributedContext, stop: StopRequest, *, started_at: float
) -> None:
    config, run_dir = experiment.config, status.run_dir
    log.info("Training on %s, device %s", experiment.dataset, experiment.device)
    print_path("Run folder", run_dir)
    verify_precision(experiment)
    experiment = choose_kernels(experiment, local_tasks(experiment, 0, ranks))

    # Restore the state and send it to the workers.
    state, meter = TrainState.create(experiment.theta, config.outer), Meter(experiment.device)
    config_yaml = to_yaml(config)
    restore_run(state, meter, status, config_yaml)
    ranks.broadcast(BroadcastState(run_dir, config, state.state_dict(), experiment.kernels_on_gpus))

    # Train, test, and log the result.
    keys, metric = result_keys(config), experiment.metric.name
    layout = build_layout(
        metric,
        has_curvature=has_curvature(experiment),
        has_eigenvalue=config.log.eigenvalue_every is not None,
    )
    resumed_at = state.iteration if status.started else None
    with (
        experiment.precision(),
        TensorBoardLogger(
            run_dir, config=config_yaml, layout=layout, resumed_at=resumed_at, file_sizes=status.file_sizes
        ) as tensorboard,
        progress_bar() as progress,
    ):
        checkpointer = Checkpointer(run_dir, config_yaml, meter, tensorboard, config.run.checkpoint_every_s, started_at)
        threads = build_thread_tuner(experiment, state, ranks)
        context = TrainContext(experiment, run_dir, meter, stop, progress, ranks, threads, checkpointer)
        best, result = train_and_test(context, state)
        metrics = {
            **accuracy_metrics(experiment, result),
            "processes": ranks.size,
            "iterations": state.iteration,
            "iterations.skipped": state.skipped,
            f"validation.best_{metric}": best.validation_score,
            "validation.best_iteration": best.iteration,
            **cost_metrics(meter, total_s=checkpointer.total_s),
        }
        tensorboard.log_test(result, best.iteration)
        tensorboard.log_hparams(keys, hparams_metrics(metrics), state.iteration)
        if not is_part_of_more(run_dir):
            tensorboard.add_summary(experiment_summary([keys], metric))

    # Write metrics.json, which marks the run as finished, and print the summary.
    write_metrics(metrics, result, run_dir)
    with experiment.precision():
        if path := save_sinusoid_plot(experiment, best.params, run_dir):
            print_path("Picture", path)
    print_summary("Summary", {**accuracy_rows(experiment, result), **cost_rows(metrics)})
    print_path("Run folder", run_dir)


def train_worker(config: TrainConfig) -> None:
    """Train as one of the processes other than the main one: take the same meta-steps, and write nothing."""
    check_tasks_per_process(config, torchrun.world_size())
    with init_distributed(training_device(config)) as ranks:
        experiment = build_experiment(config)
        start: BroadcastState | None = ranks.broadcast(None)
        if start is None:  # the run is finished
            return
        check_ranks_agree(config, start.config, ranks)
        experiment = replace(with_config(experiment, start.config), kernels_on_gpus=start.kernels_on_gpus)
        state = TrainState.create(experiment.theta, experiment.config.outer)
        state.load_state_dict(start.state)
        with StopRequest() as stop, experiment.precision(), progress_bar(visible=False) as progress:
            meter = Meter(experiment.device)
            threads = build_thread_tuner(experiment, state, ranks)
            context = TrainContext(experiment, start.run_dir, meter, stop, progress, ranks, threads, checkpointer=None)
            train_and_test(context, state)


def build_thread_tuner(experiment: Experiment, state: TrainState, ranks: DistributedContext) -> ThreadTuner:
    """Set the number of CPU threads as ``run.threads`` says, and as the checkpoint that is resumed had it."""
    run = experiment.config.run
    tuner = ThreadTuner.create(
        run.threads,
        experiment.device,
        deterministic=run.deterministic,
        resumed=state.threads,
        resumed_choices=state.thread_choices,
        processes=ranks.size,
    )
    state.thread_choices = tuner.choices
    return tuner


def train_and_test(context: TrainContext, state: TrainState) -> tuple[BestCheckpoint, Evaluation]:
    """Run the training loop and test the best parameters; if either is interrupted, save a checkpoint and name it.

    The state is not saved if training has diverged, because the checkpoint before is the better one.
    """
    ranks, checkpointer, latest = context.ranks, context.checkpointer, ""
    try:
        train_loop(context, state)
        assert state.best is not None, "the last meta-step is followed by validation"
        result = context.evaluate(state.best.params, test=True)
        if checkpointer:
            checkpointer.finish(state)
        return state.best, result
    except (Exception, SystemExit) as raised:
        error: BaseException = raised
        if is_out_of_memory(error):
            clear_frames(error.__traceback__)  # which hold the activations
        if checkpointer:
            if not isinstance(error, DivergedError):
                checkpointer.save_on_exit(state)
            latest = checkpointer.describe_latest()
    # Explain it, now that nothing can be lost.
    if is_out_of_memory(error):
        error = explain_out_of_memory(error, context.experiment, processes=ranks.size)
    elif isinstance(error, SystemExit):
        error = terminated_by(error) or error
    if latest and isinstance(error, MetalearnError):
        error.args, error.resumable = (f"{error} {latest}",), context.run_dir
    elif latest:
        kind, message = type(error).__name__, first_line(error)
        log.warning("%s ends the training (%s). %s run.resume=true resumes it.", kind, message, latest)
    if isinstance(error, TerminatedError):
        ranks.wait_for_main()  # torchrun ends the other processes as soon as one has ended
    raise error


def check_tasks_per_process(config: TrainConfig, processes: int) -> None:
    """Raise ``ConfigError``, naming the key, if there is not a task for every process.

    Call it before the processes meet: one that ends while others connect leaves them an error of the network.
    """
    for name, tasks in (
        ("task.meta_batch", config.task.meta_batch),
        ("eval.validation_episodes", config.eval.validation_episodes),
        ("eval.episodes", config.eval.episodes),
    ):
        if tasks < processes:
            raise ConfigError(
                f"{name}={tasks}: {processes} processes share these tasks; take as many, or fewer processes"
            )


def check_ranks_agree(config: TrainConfig, main_config: TrainConfig, ranks: DistributedContext) -> None:
    """Raise ``RunError`` with the keys that differ if this process would train on something else than the main one."""
    here, there = result_keys(config), result_keys(main_config)
    if config.inner.engine == "auto":  # the main process resolves it
        here |= {name: value for name, value in there.items() if name.startswith("inner.")}
    if names := changed_keys(here, there):
        raise RunError(
            f"process {ranks.rank} would train on something else than the first:\n"
            + "\n".join(f"{name}: {here.get(name)} here, {there.get(name)} in the first" for name in names)
            + "\nGive every machine the same data set and command; data.fallback=null stops where it is missing."
        )


def verify_precision(experiment: Experiment) -> None:
    """Compare the first meta-gradient with float32's if the run computes with less; raise ``RunError`` if it is off."""
    precision = experiment.config.run.precision
    if precision != "float32":
        batch = experiment.train.batch(0, experiment.config.task.meta_batch)
        report = check_precision(
            *(experiment.forward, experiment.theta, batch, experiment.inner),
            precision=precision,
            loss=experiment.metric.loss,
            engine=experiment.algorithm.engine,
        )
        log.info("%s", report)
