"""The outer loop: meta-steps, validation, and one test of the best checkpoint.

    theta <- Adam(theta, d/dtheta 1/T sum_t L_query,t(adapt_t(theta)))

The checkpoint with the best validation accuracy is the one that is tested.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from metalearn.errors import NonFiniteLossError, RunError
from metalearn.metagrad import meta_gradient
from metalearn.runs.checkpoints import (
    Checkpoint,
    best_path,
    claim,
    load_checkpoint,
    load_state,
    save_checkpoint,
    save_state,
)
from metalearn.runs.checks import compared_keys
from metalearn.runs.console import print_facts, print_path, progress_bar
from metalearn.runs.evaluation import Evaluation, accuracy, evaluate
from metalearn.runs.experiment import Experiment, build
from metalearn.runs.folders import locked
from metalearn.runs.meter import Meter
from metalearn.runs.metrics import (
    accuracy_metrics,
    accuracy_rows,
    cost_metrics,
    cost_rows,
    hparams_metrics,
    write_metrics,
)
from metalearn.runs.planning import settle_engine
from metalearn.runs.precision import check_precision
from metalearn.runs.schema import TrainConfig
from metalearn.runs.state import Best, TrainState
from metalearn.runs.testing import final_test
from metalearn.runs.tracking import Tracker
from metalearn.runs.views import second_order_term, show_tasks
from metalearn.types import Episodes

log = logging.getLogger(__name__)


def train(
    config: TrainConfig,
    run_dir: Path,
    to_yaml: Callable[[TrainConfig], str],
    continued: Callable[[TrainConfig, Path], TrainConfig],
) -> None:
    """Train, validate, and test the best checkpoint; write everything into ``run_dir``.

    Args:
        config: checked, with the data set that is really there, and the engine of a run that goes on.
        run_dir: a folder that holds no other run, or, with ``run.resume``, this one's.
        to_yaml: makes a configuration text, for ``config.yaml`` and TensorBoard; of the one with the settled engine.
        continued: the configuration of a run that may go on in its folder; refuses one that differs from the folder's.

    Raises:
        FolderTakenError: if the folder holds another run.
        RunError: if a figure or a parameter is no longer finite, or a checkpoint is damaged.
        ConfigError: if the device is not there.
        DataError: if the data set is missing or damaged.
    """
    started = time.perf_counter()
    resume = config.run.resume is not False
    experiment = settle_engine(build(config))
    built = time.perf_counter()
    with locked(run_dir, wait=resume):
        started += time.perf_counter() - built  # waiting for another process is not this run's time
        continued(experiment.config, run_dir)  # again: another process may have begun the run since
        if resume and (run_dir / "metrics.json").exists():
            log.info("This run is finished: %s", run_dir)
            return
        begun = resume and (run_dir / "config.yaml").exists()
        config_yaml = to_yaml(experiment.config)
        if not begun:
            claim(run_dir, config_yaml)
        _train(experiment, run_dir, config_yaml, started=started, begun=begun)


def _train(experiment: Experiment, run_dir: Path, config_yaml: str, *, started: float, begun: bool) -> None:
    config = experiment.config
    log.info("Training on %s, device %s", experiment.dataset, experiment.device)
    print_path("Run folder", run_dir)
    prove_precision(experiment)
    state = TrainState.start(experiment.theta, config.outer)
    meter = Meter(experiment.device)
    started -= load_state(state, meter, run_dir=run_dir)
    if state.iteration > 0:
        log.info("Going on from meta-step %d", state.iteration)
    elif begun:
        log.warning("The run was interrupted before it could put its state away: it starts anew")
    with (
        experiment.precision(),
        Tracker(run_dir, config=config_yaml, resumed_at=state.iteration if begun else None) as tracker,
        progress_bar() as progress,
    ):
        meta_train(experiment, state, run_dir, meter=meter, tracker=tracker, progress=progress, started=started)
        best = load_checkpoint(best_path(run_dir), like=state.params, device=experiment.device)
        result = final_test(experiment, best.params, config.eval.episodes, progress)
        metrics = {
            **accuracy_metrics(experiment, result),
            "iterations": state.iteration,
            "validation.best_accuracy": best.validation_accuracy,
            "validation.best_iteration": best.iteration,
            **cost_metrics(meter, total_s=time.perf_counter() - started),
        }
        tracker.test(result, best.iteration)
        tracker.hparams(compared_keys(config), hparams_metrics(metrics), state.iteration)
    write_metrics(metrics, result, run_dir)
    print_facts("Summary", {**accuracy_rows(experiment, result), **cost_rows(metrics)})
    print_path("Run folder", run_dir)


def prove_precision(experiment: Experiment) -> None:
    """Compare the first meta-gradient with float32's, if the run computes with less.

    Raises:
        RunError: if rounding takes away what the second-order term would give.
    """
    if experiment.config.run.precision == "bfloat16":
        batch = experiment.train.batch(0, experiment.config.task.meta_batch)
        report = check_precision(experiment.forward, experiment.theta, batch, experiment.inner, dtype=torch.bfloat16)
        log.info("%s", report)


def meta_train(
    experiment: Experiment,
    state: TrainState,
    run_dir: Path,
    *,
    meter: Meter,
    tracker: Tracker,
    progress: Progress,
    started: float,
) -> None:
    """Take the meta-steps that are left; keep the best parameters, and what an interrupted run goes on from.

    Args:
        experiment: what to compute with.
        state: changed in place.
        run_dir: where checkpoints go.
        meter: of times and memory.
        tracker: for the curves.
        progress: for a bar.
        started: when the run began, on the clock of ``time.perf_counter``.
    """
    config = experiment.config
    last = config.outer.iterations
    bar = progress.add_task("meta-training", total=last, completed=state.iteration, note="")
    while state.iteration < last:
        episodes = experiment.train.batch(state.iteration, config.task.meta_batch)
        lr = state.optimizer.param_groups[0]["lr"]
        with meter.step():
            figures = meta_step(experiment, state, episodes)
        meter.add(figures)
        progress.update(bar, completed=state.iteration)
        validation_due = state.iteration % config.eval.every == 0 or state.iteration == last
        looks = [every for every in (config.log.curvature_every, config.log.eigenvalue_every) if every]
        if validation_due or any(state.iteration % every == 0 for every in [config.log.every, *looks]):
            window = meter.close_window()
            _refuse_nonfinite(window, state, config)
            with meter.logging():
                tracker.scalars({**window, "outer/lr": lr}, state.iteration)
                tracker.scalars(second_order_term(experiment, state, episodes), state.iteration)
            if validation_due:
                result = validate(experiment, state, run_dir)
                with meter.logging():
                    tracker.validation(result, state.iteration)
                    show_tasks(experiment, state, tracker)
                save_state(state, meter, total_s=time.perf_counter() - started, run_dir=run_dir)
                progress.update(bar, note=f"validation {result.accuracy.mean:.1%}")
            meter.open_window()


def meta_step(experiment: Experiment, state: TrainState, episodes: Episodes) -> dict[str, Tensor]:
    """One step of the meta-optimiser on a batch of tasks; returns its figures, still on the device."""
    try:
        result = meta_gradient(experiment.forward, state.params, episodes, experiment.inner)
    except NonFiniteLossError as error:
        raise _diverged(str(error).rstrip("."), state, experiment.config) from None
    for name, p in state.params.items():
        p.grad = result.grads[name]
    norm = clip_grad_norm_(state.params.values(), experiment.config.outer.clip_norm or math.inf)
    state.optimizer.step()
    state.optimizer.zero_grad()
    if state.schedule is not None:
        state.schedule.step()
    state.iteration += 1
    figures = {
        "query_loss": result.loss,
        "query_accuracy": accuracy(result.predictions, episodes.query_y).mean(),
        "grad_norm": norm,
    }
    if experiment.inner.steps > 0:
        figures["support_loss"] = result.support_loss[0]
    return figures


def validate(experiment: Experiment, state: TrainState, run_dir: Path) -> Evaluation:
    """Accuracy on validation classes; saves the parameters if they are the best so far."""
    config = experiment.config
    if not all(torch.isfinite(p).all() for p in state.params.values()):
        raise _diverged("a parameter is not finite", state, config)
    result = evaluate(
        experiment.forward,
        state.params,
        experiment.validation,
        experiment.eval_inner,
        episodes=config.eval.validation_episodes,
        batch=experiment.eval_batch,
        nontransductive=False,
    )
    mean = result.accuracy.mean
    if state.best is None or mean > state.best.validation_accuracy:
        save_checkpoint(Checkpoint(state.params, state.iteration, mean), best_path(run_dir))
        state.best = Best(state.iteration, mean)
    log.info("%6d/%d  validation accuracy %s", state.iteration, config.outer.iterations, result.accuracy)
    return result


def _refuse_nonfinite(window: dict[str, float], state: TrainState, config: TrainConfig) -> None:
    bad = [f"{tag} is {value}" for tag, value in window.items() if not math.isfinite(value)]
    if bad:
        raise _diverged(", ".join(bad), state, config)


def _diverged(what: str, state: TrainState, config: TrainConfig) -> RunError:
    remedy = (
        f"Try a smaller inner.lr (now {config.inner.lr}) or outer.lr ({config.outer.lr}), or outer.clip_norm=10 "
        f"(now {config.outer.clip_norm or 'null'})."
    )
    kept = f" The checkpoint of meta-step {state.best.iteration} is kept." if state.best else ""
    return RunError(f"Training has diverged by meta-step {state.iteration}: {what}. {remedy}{kept}")
