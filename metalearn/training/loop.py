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
from metalearn.core.errors import NonFiniteError, RunError, StoppedError
from metalearn.core.types import Episodes
from metalearn.training.failures import keep_episode
from metalearn.training.out_of_memory import explained_out_of_memory
from metalearn.training.session import Session
from metalearn.training.state import Best, TrainState
from metalearn.training.step import own_tasks, propose, take
from metalearn.training.tracking.images import learned_rates, second_order_term, show_rates, show_tasks

log = logging.getLogger(__name__)

MOST_SKIPPED_IN_A_ROW = 100
"""With ``run.on_nonfinite=skip``: what does not recover is not waited for."""


@contextmanager
def put_away_if_it_ends(session: Session, state: TrainState) -> Iterator[None]:
    """Around a training and its test: what ends it leaves the state put away, and says where.

    Parameters that have led to numbers that are not finite are not put away: the checkpoint before is the better one.

    Raises:
        RunError: what was raised, or one that explains where memory ran out.
    """
    try:
        with explained_out_of_memory(session.experiment, processes=session.ranks.size):
            yield
    except RunError as error:
        if session.saver:
            if not isinstance(error, DivergedError):
                session.saver.save_at_the_end(state)
            if kept := session.saver.kept():
                error.args = (f"{error} {kept}",)
        if isinstance(error, StoppedError):
            session.ranks.wait_for_first()  # one that ends earlier has torchrun end the others
        raise


class DivergedError(RunError):
    """A training whose numbers are no longer finite."""


def meta_train(session: Session, state: TrainState) -> None:
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
        asked_to_end = meta_step(session, state)
        session.progress.update(bar, completed=state.iteration)
        if asked_to_end:
            raise StoppedError(session.stop.signal or signal.SIGTERM)
        if session.saver and session.saver.due and not validation_due(session, state):
            session.saver.save(state)


def validation_due(session: Session, state: TrainState) -> bool:
    """Whether validation comes before the next meta-step; a run that was interrupted in it takes it again."""
    config = session.experiment.config
    at = state.iteration
    return at > state.validated and (at % config.eval.every == 0 or at == config.outer.iterations)


def meta_step(session: Session, state: TrainState) -> bool:
    """One meta-step, taken or skipped; returns whether a process was asked to end."""
    experiment, meter = session.experiment, session.meter
    config, lr = experiment.config, state.lr
    episodes = own_tasks(experiment, state.iteration, session.ranks)
    asked = session.stop.asked
    try:
        with meter.step():
            update = propose(experiment, state, episodes, session.ranks, stop=asked)
            take(state, update, clip_norm=config.outer.clip_norm)
        meter.add(update.figures)
        asked = update.stop
    except NonFiniteError as error:
        asked = error.asked_to_end or asked
        _skip(session, state, episodes, error)
    show(session, state, episodes, lr)
    return asked


def show(session: Session, state: TrainState, episodes: Episodes, lr: float) -> None:
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
            tracker.scalars({**window, **skipped, **learned_rates(state), "outer/lr": lr}, state.iteration)
            tracker.scalars(_look(session, state, episodes), state.iteration)
    session.meter.open_window()


def _look(session: Session, state: TrainState, episodes: Episodes) -> dict[str, float]:
    """The second-order term, where it is to be seen and finite; a look must not end a run that goes on."""
    try:
        return second_order_term(session.experiment, state, episodes)
    except NonFiniteError as error:
        log.warning("No look at the second-order term at meta-step %d: %s", state.iteration, error)
        return {}


def validate(session: Session, state: TrainState) -> float:
    """Score on validation tasks; the parameters are kept if they are the best so far.

    Raises:
        RunError: if a parameter is not finite.
        StoppedError: if the process was asked to end meanwhile; the run then validates when it goes on.
    """
    config = session.experiment.config
    if not state.finite():
        raise diverged("a parameter is not finite.", config, state.iteration)
    for name, statistic in session.experiment.statistics(state.params, state.iteration).items():
        state.params[name].copy_(statistic)
    result = session.evaluate(state.params, test=False)
    mean: float = session.ranks.from_first(result.final.mean)  # so that all keep the same parameters
    if not math.isfinite(mean):
        steps = [k for k, estimate in enumerate(result.per_step) if not math.isfinite(estimate.mean)]
        log.warning("The validation %s is %s from inner step %d on", session.experiment.score.name, mean, steps[0])
    if state.best is None or session.experiment.score.better(mean, state.best.validation_score):
        state.best = Best(state.iteration, mean, {name: p.detach().clone() for name, p in state.params.items()})
    state.validated = state.iteration
    if session.saver:
        score = session.experiment.score
        words = (score.name, result.final.text(score))
        log.info("%6d/%d  validation %s %s", state.iteration, config.outer.iterations, *words)
        with session.meter.logging():
            session.saver.tracker.validation(result, state.iteration)
            show_tasks(session.experiment, state, session.saver.tracker)
            show_rates(state, session.saver.tracker)
    session.meter.open_window()  # before the state is saved: validation is no meta-step's time
    if session.saver:
        session.saver.save(state)
    return mean


def _skip(session: Session, state: TrainState, episodes: Episodes, error: NonFiniteError) -> None:
    """Pass a meta-step by whose numbers are not finite, or stop; its task is put away either way."""
    config, number = session.experiment.config, state.iteration + 1
    path = _keep(session, state, episodes, error)
    what = f"{str(error).rstrip('.')}." + (f" Its episode is kept in {path}." if path else "")
    if config.run.on_nonfinite == "stop":
        raise diverged(what, config, number)
    if state.skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW:
        raise diverged(f"{MOST_SKIPPED_IN_A_ROW} meta-steps in a row were skipped. {what}", config, number)
    log.warning("Meta-step %d is skipped: %s", number, what)
    state.iteration += 1
    state.skipped += 1
    state.skipped_in_a_row += 1


def _keep(session: Session, state: TrainState, episodes: Episodes, error: NonFiniteError) -> Path | None:
    config = session.experiment.config
    try:
        return keep_episode(
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


def diverged(what: str, config: TrainConfig, meta_step: int) -> DivergedError:
    """The error of a training that cannot go on, with what to do."""
    remedy = (
        f"Try a smaller inner.lr (now {config.inner.lr}) or outer.lr ({config.outer.lr}), or outer.clip_norm=10 "
        f"(now {config.outer.clip_norm or 'null'})"
    ) + ("." if config.run.on_nonfinite == "skip" else "; run.on_nonfinite=skip passes such meta-steps by.")
    accept = " What you change so is named in run.accept=[...] when the run goes on."
    return DivergedError(f"Training has diverged at meta-step {meta_step}: {what} {remedy}{accept}")
