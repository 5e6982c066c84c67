"""The outer loop: meta-steps, validation, and what is shown and put away between them.

    theta <- Adam(theta, d/dtheta 1/T sum_t L_query,t(adapt_t(theta)))

Whatever ends it, ends it between two meta-steps, with the state put away.
"""

from __future__ import annotations

import logging
import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from metalearn.config.schema import TrainConfig
from metalearn.core.errors import NonFiniteError, RunError, TerminatedError
from metalearn.core.types import Episodes
from metalearn.training.failures import dump_episode
from metalearn.training.out_of_memory import explain_out_of_memory
from metalearn.training.session import TrainContext
from metalearn.training.state import BestCheckpoint, TrainState
from metalearn.training.step import apply_update, compute_update, local_tasks
from metalearn.training.tracking.images import (
    learned_lr_metrics,
    log_lr_histograms,
    log_task_images,
    second_order_metrics,
)

log = logging.getLogger(__name__)

MAX_CONSECUTIVE_SKIPS = 100
"""With ``run.on_nonfinite=skip``: what does not recover is not waited for."""


@contextmanager
def save_on_exit(session: TrainContext, state: TrainState) -> Iterator[None]:
    """Around a training and its test: what ends it leaves the state put away, and says where.

    Parameters that have led to numbers that are not finite are not put away: the checkpoint before is the better one.

    Raises:
        RunError: what was raised, or one that explains where memory ran out.
    """
    try:
        with explain_out_of_memory(session.experiment, processes=session.ranks.size):
            yield
    except RunError as error:
        if session.saver:
            if not isinstance(error, DivergedError):
                session.saver.save_at_the_end(state)
            if kept := session.saver.kept():
                error.args = (f"{error} {kept}",)
        if isinstance(error, TerminatedError):
            session.ranks.wait_for_main()  # one that ends earlier has torchrun end the others
        raise


class DivergedError(RunError):
    """A training whose numbers are no longer finite."""


def train_loop(session: TrainContext, state: TrainState) -> None:
    """Take the meta-steps that are left; keep the best parameters, and what an interrupted run goes on from.

    Args:
        session: of this process.
        state: changed in place; the same in every process.

    Raises:
        StoppedError: if a process was asked to end.
        RunError: if a number is not finite, or another process is gone.
    """
    last = session.experiment.config.outer.iterations
    bar = session.progress.add_task("meta-training", total=last, completed=state.iteration, note="")
    session.meter.go_on()
    while True:
        if validation_due(session, state):
            if session.saver and session.ranks.size > 1:  # which do not end in a validation when they are asked to
                session.saver.save(state)
            mean = validate(session, state)
            session.progress.update(bar, note=f"validation {session.experiment.score.text(mean, digits=1)}")
        if state.iteration >= last:
            return
        stop_requested = meta_step(session, state)
        session.progress.update(bar, completed=state.iteration)
        if stop_requested:
            raise TerminatedError(session.stop.signal or signal.SIGTERM)
        if session.saver and session.saver.due and not validation_due(session, state):
            session.saver.save(state)


def validation_due(session: TrainContext, state: TrainState) -> bool:
    """Whether validation comes before the next meta-step; a run that was interrupted in it takes it again."""
    config = session.experiment.config
    at = state.iteration
    return at > state.validated and (at % config.eval.every == 0 or at == config.outer.iterations)


def meta_step(session: TrainContext, state: TrainState) -> bool:
    """One meta-step, taken or skipped; returns whether a process was asked to end."""
    experiment, meter = session.experiment, session.meter
    config, lr = experiment.config, state.lr
    episodes = local_tasks(experiment, state.iteration, session.ranks)
    asked = session.stop.asked
    try:
        with meter.step():
            update = compute_update(experiment, state, episodes, session.ranks, stop=asked)
            apply_update(state, update, clip_norm=config.outer.clip_norm)
        meter.add(update.metrics)
        asked = update.stop
    except NonFiniteError as error:
        asked = error.stop_requested or asked
        _handle_nonfinite(session, state, episodes, error)
    log_step(session, state, episodes, lr)
    return asked


def log_step(session: TrainContext, state: TrainState, episodes: Episodes, lr: float) -> None:
    """The curves' points that are due after a meta-step.

    Args:
        session: of this process.
        state: after the meta-step.
        episodes: this process's tasks of it.
        lr: the learning rate that it was taken with.
    """
    log_config = session.experiment.config.log
    every = [log_config.every, log_config.curvature_every, log_config.eigenvalue_every]
    if not (validation_due(session, state) or any(n and state.iteration % n == 0 for n in every)):
        return
    window = session.meter.close_window()
    if tracker := session.tracker:
        with session.meter.logging():
            skipped = {"train/skipped": float(state.skipped)} if state.skipped else {}
            tracker.scalars({**window, **skipped, **learned_lr_metrics(state), "outer/lr": lr}, state.iteration)
            tracker.scalars(_log_second_order(session, state, episodes), state.iteration)
    session.meter.open_window()


def _log_second_order(session: TrainContext, state: TrainState, episodes: Episodes) -> dict[str, float]:
    """The second-order term, where it is to be seen and finite; a look must not end a run that goes on."""
    try:
        return second_order_metrics(session.experiment, state, episodes)
    except NonFiniteError as error:
        log.warning("No look at the second-order term at meta-step %d: %s", state.iteration, error)
        return {}


def validate(session: TrainContext, state: TrainState) -> float:
    """Score on validation tasks; the parameters are kept if they are the best so far.

    Raises:
        RunError: if a parameter is not finite.
        StoppedError: if the process was asked to end meanwhile; the run then validates when it goes on.
    """
    config = session.experiment.config
    if not state.finite():
        raise divergence_error("a parameter is not finite.", config, state.iteration)
    for name, statistic in session.experiment.statistics(state.params, state.iteration).items():
        state.params[name].copy_(statistic)
    result = session.evaluate(state.params, test=False)
    mean: float = session.ranks.broadcast(result.final.mean)  # so that all keep the same parameters
    if not math.isfinite(mean):
        steps = [k for k, estimate in enumerate(result.per_step) if not math.isfinite(estimate.mean)]
        log.warning("The validation %s is %s from inner step %d on", session.experiment.score.name, mean, steps[0])
    if state.best is None or session.experiment.score.better(mean, state.best.validation_score):
        state.best = BestCheckpoint(
            state.iteration, mean, {name: p.detach().clone() for name, p in state.params.items()}
        )
    state.validated = state.iteration
    if session.saver:
        score = session.experiment.score
        words = (score.name, result.final.text(score))
        log.info("%6d/%d  validation %s %s", state.iteration, config.outer.iterations, *words)
        with session.meter.logging():
            session.saver.tracker.validation(result, state.iteration)
            log_task_images(session.experiment, state, session.saver.tracker)
            log_lr_histograms(state, session.saver.tracker)
    session.meter.open_window()  # before the state is saved: validation is no meta-step's time
    if session.saver:
        session.saver.save(state)
    return mean


def _handle_nonfinite(session: TrainContext, state: TrainState, episodes: Episodes, error: NonFiniteError) -> None:
    """Pass a meta-step by whose numbers are not finite, or stop; its task is put away either way."""
    config, number = session.experiment.config, state.iteration + 1
    path = _dump_episode(session, state, episodes, error)
    what = f"{str(error).rstrip('.')}." + (f" Its episode is kept in {path}." if path else "")
    if config.run.on_nonfinite == "stop":
        raise divergence_error(what, config, number)
    if state.consecutive_skips >= MAX_CONSECUTIVE_SKIPS:
        raise divergence_error(f"{MAX_CONSECUTIVE_SKIPS} meta-steps in a row were skipped. {what}", config, number)
    log.warning("Meta-step %d is skipped: %s", number, what)
    state.iteration += 1
    state.skipped += 1
    state.consecutive_skips += 1


def _dump_episode(session: TrainContext, state: TrainState, episodes: Episodes, error: NonFiniteError) -> Path | None:
    config = session.experiment.config
    try:
        return dump_episode(
            error,
            episodes,
            state.params,
            first=session.ranks.share(config.task.meta_batch).start,
            iteration=state.iteration,
            config=config,
            run_dir=session.run_dir,
        )
    except OSError as lacking:  # which must not hide what has happened
        log.warning("The episode could not be kept: %s", lacking)
        return None


def divergence_error(what: str, config: TrainConfig, meta_step: int) -> DivergedError:
    """The error of a training that cannot go on, with what to do."""
    remedy = (
        f"Try a smaller inner.lr (now {config.inner.lr}) or outer.lr ({config.outer.lr}), or outer.clip_norm=10 "
        f"(now {config.outer.clip_norm or 'null'})"
    ) + ("." if config.run.on_nonfinite == "skip" else "; run.on_nonfinite=skip passes such meta-steps by.")
    accept = " What you change so is named in run.accept=[...] when the run goes on."
    return DivergedError(f"Training has diverged at meta-step {meta_step}: {what} {remedy}{accept}")
