"""What a training shows of itself beside its curves: pictures of tasks, and the second-order term."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from metalearn.core import serialization as files
from metalearn.core.errors import NonFiniteLossError
from metalearn.core.types import Episodes, Params
from metalearn.data.sinusoid import SinusoidSampler
from metalearn.inner import adapt, lr_key, meta_params_at_step, predict
from metalearn.training.experiment import Experiment
from metalearn.training.state import TrainState
from metalearn.training.tracking.curvature import curvature, support_eigenvalue
from metalearn.training.tracking.pictures import draw_tasks
from metalearn.training.tracking.tensorboard import TensorBoardLogger

log = logging.getLogger(__name__)

_TASKS_SHOWN = 4


def second_order_metrics(experiment: Experiment, state: TrainState, episodes: Episodes) -> dict[str, float]:
    """What is to be seen of it at this meta-step, by tag; nothing at most of them."""
    log_config = experiment.config.log
    seen: dict[str, float] = {}
    has_one = experiment.algorithm.engine is None and experiment.inner.steps > 0
    if has_one and log_config.curvature_every and state.iteration % log_config.curvature_every == 0:
        seen |= curvature(experiment.forward, state.params, episodes, experiment.inner, loss=experiment.score.loss)
    if log_config.eigenvalue_every and state.iteration % log_config.eigenvalue_every == 0:
        point = meta_params_at_step(state.params, experiment.inner)
        seen |= support_eigenvalue(experiment.forward, point, episodes, loss=experiment.score.loss)
    return seen


def learned_lr_metrics(state: TrainState) -> dict[str, float]:
    """Mean, smallest and largest of the step sizes that are learned, by tag; nothing if none are."""
    rates = [p.flatten() for name, p in state.params.items() if name.startswith(lr_key(""))]
    if not rates:
        return {}
    flat = torch.cat(rates)
    return {
        f"rates/{name}": value
        for name, value in zip(
            ("mean", "smallest", "largest"), torch.stack([flat.mean(), *flat.aminmax()]).tolist(), strict=True
        )
    }


def log_lr_histograms(state: TrainState, tracker: TensorBoardLogger) -> None:
    """Histograms of the learned step sizes, one for each parameter of the model."""
    for name, p in state.params.items():
        if name.startswith(lr_key("")):
            tracker.histogram(f"rates/{name.removeprefix(lr_key(''))}", p, state.iteration)


def save_sinusoid_plot(experiment: Experiment, params: Params, run_dir: Path) -> Path | None:
    """Write ``sinusoid.png``: the functions of validation tasks before and after 1 and 10 steps; else nothing."""
    if not isinstance(experiment.validation, SinusoidSampler):
        return None
    path = run_dir / "sinusoid.png"
    buffer = io.BytesIO()
    try:
        Image.fromarray(render_tasks(experiment, params)).save(buffer, format="png")
    except NonFiniteLossError as error:  # ten steps may lead where those of the test do not
        log.warning("no %s: %s", path.name, error)
        return None
    files.atomic_write_bytes(path, buffer.getvalue())
    return path


def log_task_images(experiment: Experiment, state: TrainState, tracker: TensorBoardLogger) -> None:
    """The picture of this validation, where one is wanted and can be drawn."""
    if not experiment.config.log.images:
        return
    try:
        tracker.image("validation/tasks", render_tasks(experiment, state.params), state.iteration)
    except NonFiniteLossError as error:  # the next meta-step stops the run, if training meets it as well
        log.warning("no picture at meta-step %d: %s", state.iteration, error)


def render_tasks(experiment: Experiment, params: Params) -> NDArray[np.uint8]:
    """The first validation tasks, with the predictions of the adapted model."""
    if isinstance(experiment.validation, SinusoidSampler):
        from metalearn.training.tracking.sinusoid_figure import sinusoid_figure  # here, as it brings matplotlib

        buffer = io.BytesIO()
        sinusoid_figure(experiment, params).savefig(buffer, format="png", dpi=100)
        return np.asarray(Image.open(buffer).convert("RGB"))
    tasks = experiment.validation.tasks(0, _TASKS_SHOWN)
    with torch.no_grad():
        fast = adapt(experiment.forward, params, tasks.support_x, tasks.support_y, experiment.eval_inner)
        return draw_tasks(tasks, predict(experiment.forward, fast, tasks.query_x))
