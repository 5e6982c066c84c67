"""The outer loop: meta-steps, validation, and one test of the best checkpoint.

    theta <- Adam(theta, d/dtheta 1/T sum_t L_query,t(adapt_t(theta)))

The checkpoint with the best validation accuracy is the one that is tested.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

from metalearn.errors import FolderTakenError, NonFiniteLossError, RunError
from metalearn.inner import adapt, predict
from metalearn.metagrad import meta_gradient
from metalearn.runs.checkpoints import Checkpoint, best_path, load_checkpoint, save_checkpoint
from metalearn.runs.console import print_facts, print_path, progress_bar
from metalearn.runs.curvature import curvature
from metalearn.runs.evaluation import accuracy, evaluate
from metalearn.runs.experiment import Experiment, build
from metalearn.runs.meter import Meter
from metalearn.runs.metrics import accuracy_metrics, accuracy_rows, cost_metrics, cost_rows, write_metrics
from metalearn.runs.pictures import tasks_picture
from metalearn.runs.planning import settle_engine
from metalearn.runs.precision import check_precision
from metalearn.runs.schema import OuterConfig, TrainConfig
from metalearn.runs.testing import final_test
from metalearn.runs.tracking import Tracker
from metalearn.types import Episodes, Params

log = logging.getLogger(__name__)

_TASKS_SHOWN = 4


class Best(NamedTuple):
    """Which parameters lie in the checkpoint: those after ``iteration`` meta-steps."""

    iteration: int
    validation_accuracy: float


@dataclass
class TrainState:
    """The only mutable object of a run: what changes from one meta-step to the next."""

    params: Params
    optimizer: Adam
    schedule: CosineAnnealingLR | None
    iteration: int = 0
    best: Best | None = None

    @classmethod
    def start(cls, theta: Params, outer: OuterConfig) -> TrainState:
        """Before the first meta-step."""
        params = {name: p.clone() for name, p in theta.items()}
        optimizer = Adam(params.values(), lr=outer.lr)
        cosine = outer.schedule == "cosine"
        return cls(params, optimizer, CosineAnnealingLR(optimizer, outer.iterations) if cosine else None)


def train(config: TrainConfig, run_dir: Path, to_yaml: Callable[[TrainConfig], str]) -> None:
    """Train, validate, and test the best checkpoint; write everything into ``run_dir``.

    Args:
        config: checked, with the data set that is really there.
        run_dir: a folder that holds no other run.
        to_yaml: makes a configuration text, for ``config.yaml`` and TensorBoard; of the one with the settled engine.

    Raises:
        FolderTakenError: if the folder holds another run.
        RunError: if a figure or a parameter is no longer finite.
        ConfigError: if the device is not there.
        DataError: if the data set is missing or damaged.
    """
    started = time.perf_counter()
    experiment = settle_engine(build(config))
    config_yaml = to_yaml(experiment.config)
    claim(run_dir, config_yaml)
    log.info("Training on %s, device %s", experiment.dataset, experiment.device)
    print_path("Run folder", run_dir)
    prove_precision(experiment)
    state = TrainState.start(experiment.theta, config.outer)
    meter = Meter(experiment.device)
    with (
        experiment.precision(),
        Tracker(run_dir, config=config_yaml) as tracker,
        progress_bar() as progress,
    ):
        meta_train(experiment, state, run_dir, meter=meter, tracker=tracker, progress=progress)
        best = load_checkpoint(best_path(run_dir), like=state.params, device=experiment.device)
        result = final_test(experiment, best.params, config.eval.episodes, progress)
        tracker.test(result)
    metrics = {
        **accuracy_metrics(experiment, result),
        "iterations": state.iteration,
        "validation.best_accuracy": best.validation_accuracy,
        "validation.best_iteration": best.iteration,
        **cost_metrics(meter, total_s=time.perf_counter() - started),
    }
    write_metrics(metrics, run_dir)
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


def claim(run_dir: Path, config_yaml: str) -> None:
    """Make the folder this run's own, by being the one that creates its ``config.yaml``."""
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        with (run_dir / "config.yaml").open("x") as config:
            config.write(config_yaml)
    except FileExistsError:
        raise FolderTakenError(run_dir, "config.yaml") from None


def meta_train(
    experiment: Experiment, state: TrainState, run_dir: Path, *, meter: Meter, tracker: Tracker, progress: Progress
) -> None:
    """Take the meta-steps that are left, and keep the checkpoint with the best validation accuracy."""
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
        curvature_due = bool(config.log.curvature_every) and state.iteration % (config.log.curvature_every or 1) == 0
        if validation_due or curvature_due or state.iteration % config.log.every == 0:
            window = meter.close_window()
            _refuse_nonfinite(window, state, config)
            tracker.scalars({**window, "outer/lr": lr}, state.iteration)
            if curvature_due:
                seen = curvature(experiment.forward, state.params, episodes, experiment.inner)
                tracker.scalars(seen, state.iteration)
            if validation_due:
                mean = validate(experiment, state, run_dir, tracker)
                progress.update(bar, note=f"validation {mean:.1%}")
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


def validate(experiment: Experiment, state: TrainState, run_dir: Path, tracker: Tracker) -> float:
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
    tracker.validation(result, state.iteration)
    if config.log.images:
        show_tasks(experiment, state, tracker)
    mean = result.accuracy.mean
    if state.best is None or mean > state.best.validation_accuracy:
        save_checkpoint(Checkpoint(state.params, state.iteration, mean), best_path(run_dir))
        state.best = Best(state.iteration, mean)
    log.info("%6d/%d  validation accuracy %s", state.iteration, config.outer.iterations, result.accuracy)
    return mean


def show_tasks(experiment: Experiment, state: TrainState, tracker: Tracker) -> None:
    """The picture of this validation, where there is one."""
    try:
        tracker.image("validation/tasks", picture(experiment, state.params), state.iteration)
    except NonFiniteLossError as error:  # the next meta-step stops the run, if training meets it as well
        log.warning("no picture at meta-step %d: %s", state.iteration, error)


def picture(experiment: Experiment, params: Params) -> NDArray[np.uint8]:
    """The first validation tasks, with the predictions of the adapted model."""
    tasks = experiment.validation.tasks(0, _TASKS_SHOWN)
    with torch.no_grad():
        fast = adapt(experiment.forward, params, tasks.support_x, tasks.support_y, experiment.eval_inner)
        return tasks_picture(tasks, predict(experiment.forward, fast, tasks.query_x))


def _refuse_nonfinite(window: dict[str, float], state: TrainState, config: TrainConfig) -> None:
    bad = [f"{tag} is {value}" for tag, value in window.items() if not math.isfinite(value)]
    if bad:
        raise _diverged(", ".join(bad), state, config)


def _diverged(what: str, state: TrainState, config: TrainConfig) -> RunError:
    remedy = (
        f"Try a smaller inner.lr (now {config.inner.lr}) or outer.lr ({config.outer.lr}), or outer.clip_norm=10 "
        f"(now {config.outer.clip_norm})."
    )
    kept = f" The checkpoint of meta-step {state.best.iteration} is kept." if state.best else ""
    return RunError(f"Training has diverged by meta-step {state.iteration}: {what}. {remedy}{kept}")
