"""The training loop: validate, sample, adapt, differentiate, step, log, save.

    theta <- Adam(theta, d/dtheta 1/T sum_t L_query,t(adapt_t(theta)))

``train_loop`` reads top to bottom as what happens in a meta-step; ``step.py`` has the gradient and the update.
"""

from __future__ import annotations

import logging
import math
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress

from metalearn.core.errors import NonFiniteError, TerminatedError
from metalearn.core.profiling.timing import seconds
from metalearn.core.types import Episodes, Params
from metalearn.training.checkpoints import Checkpointer
from metalearn.training.evaluate_run import evaluate_distributed
from metalearn.training.evaluation import Evaluation
from metalearn.training.experiment import Experiment
from metalearn.training.failures import DivergedError, dump_episode
from metalearn.training.runtime.distributed import DistributedContext
from metalearn.training.runtime.signals import StopRequest
from metalearn.training.runtime.threads import ThreadTuner
from metalearn.training.state import BestCheckpoint, TrainState, preserve_rng_state
from metalearn.training.step import apply_meta_update, compute_meta_update, local_tasks
from metalearn.training.tracking.curvature import curvature_due, second_order_metrics
from metalearn.training.tracking.images import log_task_images
from metalearn.training.tracking.meter import Meter
from metalearn.training.tracking.tensorboard import learned_lr_metrics

log = logging.getLogger(__name__)

MAX_CONSECUTIVE_SKIPS = 100
"""With ``run.on_nonfinite=skip``, the training stops after so many skipped meta-steps in a row."""


@dataclass(frozen=True)
class TrainContext:
    """Everything that one training process needs; ``checkpointer`` is ``None`` in all but the main process."""

    experiment: Experiment
    run_dir: Path
    meter: Meter
    stop: StopRequest
    progress: Progress
    ranks: DistributedContext
    threads: ThreadTuner
    checkpointer: Checkpointer | None

    def evaluate(self, params: Params, *, test: bool) -> Evaluation:
        """Return the scores on validation or test tasks, which the processes share; one alone stops if asked to."""
        settings = self.experiment.config.eval
        episodes = settings.episodes if test else settings.validation_episodes
        bar = self.progress.add_task("test", total=episodes, note="") if test else None

        def update(done: int) -> None:
            if bar is not None:
                self.progress.update(bar, completed=min(done * self.ranks.size, episodes))
            if self.ranks.size == 1:
                self.stop.raise_if_requested()

        return evaluate_distributed(self.experiment, params, episodes, test=test, ranks=self.ranks, progress=update)


def train_loop(context: TrainContext, state: TrainState) -> None:
    """Take the remaining meta-steps, keep the best parameters, and save checkpoints; changes ``state``.

    Raises:
        TerminatedError: if a signal has asked a process to stop.
        RunError: if a number is not finite, or another process is gone.
    """
    experiment, meter, ranks, checkpointer = context.experiment, context.meter, context.ranks, context.checkpointer
    outer = experiment.config.outer
    bar = context.progress.add_task("meta-training", total=outer.iterations, completed=state.iteration, note="")
    if state.threads is None:  # a resumed run has the number of its checkpoint
        tune_threads(context, state)
    meter.resume_clock()
    while True:
        # Validate every eval.every meta-steps and after the last. Several processes cannot stop in a validation, so
        # save first.
        if validation_due(context, state):
            if checkpointer and ranks.size > 1:
                checkpointer.save(state)
            score = validate(context, state)
            context.progress.update(bar, note=f"validation {experiment.metric.format(score, digits=1)}")
        if state.iteration >= outer.iterations:
            return

        # Sample this process's tasks of the batch.
        episodes = local_tasks(experiment, state.iteration, ranks)
        lr, stop_requested = state.lr, context.stop.requested

        # Adapt, differentiate, reduce, check; then step. A batch that is not finite is skipped or ends the training.
        try:
            with meter.time_step():
                update = compute_meta_update(experiment, state, episodes, ranks, stop_requested=stop_requested)
                apply_meta_update(state, update, clip_norm=outer.clip_norm)
            meter.add(update.metrics)
            stop_requested = update.stop_requested
            del update  # frees the gradient before the next batch
        except NonFiniteError as error:
            stop_requested = error.stop_requested or stop_requested
            _handle_nonfinite(context, state, episodes, error)

        # Log.
        log_step(context, state, episodes, lr)
        context.progress.update(bar, completed=state.iteration)

        # Stop between two meta-steps, all processes after the same one.
        if stop_requested:
            raise TerminatedError(context.stop.signal or signal.SIGTERM)

        # Save a checkpoint, unless the next validation does.
        if checkpointer and checkpointer.is_due and not validation_due(context, state):
            checkpointer.save(state)


def tune_threads(context: TrainContext, state: TrainState) -> None:
    """Choose the number of threads (``run.threads=auto``) by meta-gradients of the next tasks, which change nothing."""
    experiment = context.experiment

    def step() -> None:
        with preserve_rng_state(), suppress(NonFiniteError):  # the meta-step itself raises it
            experiment.meta_gradient(state.params, episodes, state.iteration)

    if context.threads.choices and state.iteration < experiment.config.outer.iterations:
        episodes = local_tasks(experiment, state.iteration, context.ranks)
        with context.meter.logging():
            context.threads.tune(lambda: seconds(step, experiment.device))


def validation_due(context: TrainContext, state: TrainState) -> bool:
    """Return whether to validate before the next meta-step; an interrupted validation is repeated."""
    config = context.experiment.config
    at = state.iteration
    return at > state.last_validated and (at % config.eval.every == 0 or at == config.outer.iterations)


def validate(context: TrainContext, state: TrainState) -> float:
    """Evaluate on validation tasks, keep the parameters if they are the best so far, log and save; return the mean.

    Raises:
        DivergedError: if a parameter is not finite.
        TerminatedError: if a signal has asked the process to stop; the resumed run validates again.
    """
    experiment, checkpointer = context.experiment, context.checkpointer
    metric, iterations = experiment.metric, experiment.config.outer.iterations
    if not state.is_finite():
        raise DivergedError("a parameter is not finite.", experiment.config, state.iteration)
    for name, statistic in experiment.norm_statistics(state.params, state.iteration).items():
        state.params[name].copy_(statistic)

    # Evaluate. The main process's mean decides, so that all processes keep the same parameters.
    result = context.evaluate(state.params, test=False)
    mean: float = context.ranks.broadcast(result.final.mean)
    if not math.isfinite(mean):
        first = next(k for k, estimate in enumerate(result.per_step) if not math.isfinite(estimate.mean))
        log.warning("The validation %s is %s from inner step %d on", metric.name, mean, first)
    if state.best is None or metric.is_better(mean, state.best.validation_score):
        params = {name: p.detach().clone() for name, p in state.params.items()}
        state.best = BestCheckpoint(state.iteration, mean, params)

    # Log and save.
    if checkpointer:
        score = result.final.format(metric)
        log.info("%6d/%d  validation %s %s", state.iteration, iterations, metric.name, score)
        with context.meter.logging():
            checkpointer.tensorboard.log_validation(result, state.iteration)
            checkpointer.tensorboard.log_lr_histograms(state.params, state.iteration)
            log_task_images(experiment, state, checkpointer.tensorboard)
    state.last_validated = state.iteration  # once it is logged
    tune_threads(context, state)
    context.meter.open_window()  # before the state is saved, so that no meta-step's time includes the validation
    if checkpointer:
        checkpointer.save(state)
    return mean


def log_step(context: TrainContext, state: TrainState, episodes: Episodes, lr: float) -> None:
    """Log a meta-step's metrics to TensorBoard if they are due; ``state`` is after it, ``lr`` was its learning rate."""
    settings = context.experiment.config.log
    every = [n for n in (settings.every, settings.eigenvalue_every) if n]
    due = any(state.iteration % n == 0 for n in every) or curvature_due(state.iteration, settings.curvature_every)
    if not (due or validation_due(context, state)):
        return
    metrics = context.meter.close_window()
    if context.checkpointer:
        with context.meter.logging():
            if state.skipped:
                metrics["optimizer/skipped"] = float(state.skipped)
            metrics |= {"optimizer/lr": lr, **learned_lr_metrics(state.params)}
            metrics |= second_order_metrics(context.experiment, state, episodes)
            context.checkpointer.tensorboard.log_scalars(metrics, state.iteration)
    context.meter.open_window()


def _handle_nonfinite(context: TrainContext, state: TrainState, episodes: Episodes, error: NonFiniteError) -> None:
    """Skip a meta-step whose numbers are not finite, or stop; save its task either way."""
    config, meta_step = context.experiment.config, state.iteration + 1
    reason = f"{str(error).rstrip('.')}."
    try:
        first = context.ranks.shard(config.task.meta_batch).start
        path = dump_episode(error, episodes, state, first=first, config=config, run_dir=context.run_dir)
        reason += f" Its episode is kept in {path}." if path else ""
    except OSError as os_error:  # must not hide the error
        log.warning("The episode could not be saved: %s", os_error)
    if config.run.on_nonfinite == "stop":
        raise DivergedError(reason, config, meta_step)
    if state.consecutive_skips >= MAX_CONSECUTIVE_SKIPS:
        reason = f"{MAX_CONSECUTIVE_SKIPS} meta-steps in a row were skipped. {reason}"
        raise DivergedError(reason, config, meta_step)
    log.warning("Meta-step %d is skipped: %s", meta_step, reason)
    state.iteration += 1
    state.skipped += 1
    state.consecutive_skips += 1
