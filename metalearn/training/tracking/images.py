"""Images of validation tasks with the adapted model's predictions, for TensorBoard and ``sinusoid.png``."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from metalearn.core import serialization as files
from metalearn.core.errors import NonFiniteLossError
from metalearn.core.types import Episodes, Params
from metalearn.data.sinusoid import SinusoidSampler
from metalearn.inner import adapt, predict
from metalearn.training.experiment import Experiment
from metalearn.training.state import TrainState
from metalearn.training.tracking.tensorboard import TensorBoardLogger

log = logging.getLogger(__name__)

_NUM_TASKS = 4
_CELL, _GAP = 56, 6  # pixels
_NARROW = 4  # columns of images: tasks up to this width are drawn two in a row
_LETTERS = 12 / 350  # of the picture's width: legible in TensorBoard, which shrinks pictures to 350 pixels
_CORRECT_COLOUR, _WRONG_COLOUR = (0, 158, 115), (213, 94, 0)  # Okabe and Ito's green and vermilion, for every eye
_MAX_ROWS, _MAX_QUERIES = 20, 8
_SINUSOID_STEPS = (0, 1, 10)
_SINUSOID_POINTS = 200


def log_task_images(experiment: Experiment, state: TrainState, tensorboard: TensorBoardLogger) -> None:
    """Log the image of the first validation tasks, if ``log.images`` asks for it and it can be drawn."""
    if not experiment.config.log.images or not _can_draw(experiment):
        return
    try:
        tensorboard.log_image("tasks/validation", render_tasks(experiment, state.params), state.iteration)
    except NonFiniteLossError as error:  # the next meta-step stops the run, if training meets it as well
        log.warning("no picture at meta-step %d: %s", state.iteration, error)


def _can_draw(experiment: Experiment) -> bool:
    """Return whether inputs are grey or colour images of classes, or sinusoids; a user's own data need not be."""
    shape, is_regression = experiment.train.example_shape, experiment.config.data.is_regression
    is_image = len(shape) == 3 and shape[0] in (1, 3) and not is_regression
    return is_image or isinstance(experiment.validation, SinusoidSampler)


def save_sinusoid_plot(experiment: Experiment, params: Params, run_dir: Path) -> Path | None:
    """Write ``sinusoid.png``: predictions on validation tasks after 0, 1 and 10 steps; nothing for other data sets."""
    if not isinstance(experiment.validation, SinusoidSampler):
        return None
    path = run_dir / "sinusoid.png"
    buffer = io.BytesIO()
    try:
        Image.fromarray(render_tasks(experiment, params)).save(buffer, format="png")
    except NonFiniteLossError as error:  # ten steps may diverge where those of the test do not
        log.warning("no %s: %s", path.name, error)
        return None
    files.atomic_write_bytes(path, buffer.getvalue())
    return path


@torch.no_grad()
def render_tasks(experiment: Experiment, params: Params) -> NDArray[np.uint8]:
    """Draw the first validation tasks with the adapted model's predictions, ``[height, width, 3]``."""
    if isinstance(experiment.validation, SinusoidSampler):
        return _draw_sinusoids(experiment, params, experiment.validation)
    tasks = experiment.validation.tasks(0, _NUM_TASKS if experiment.config.task.ways <= _MAX_ROWS // 2 else 2)
    fast = adapt(experiment.forward, params, tasks.support_x, tasks.support_y, experiment.eval_inner)
    return draw_tasks(tasks, predict(experiment.forward, fast, tasks.query_x))


def draw_tasks(episodes: Episodes, predictions: Tensor) -> NDArray[np.uint8]:
    """Draw a batch of tasks, ``[height, width, 3]``, narrow ones in pairs: a row per class, support, then queries.

    A query's frame is green if its prediction is correct; else vermilion, with the wrong label on it. Images are
    ``[T, examples, 1 or 3, height, width]`` in [0, 1]; predictions are logits, ``[T, Q, N]``.
    """
    ways = predictions.shape[-1]
    shots, queries = (
        max(labels.count(label) for labels in y.tolist() for label in range(ways))
        for y in (episodes.support_y, episodes.query_y)
    )
    queries = min(queries, _MAX_QUERIES)
    in_pairs = shots + queries <= _NARROW and episodes.tasks % 2 == 0
    width = max(shots + queries, 3) * (_CELL + _GAP) * (2 if in_pairs else 1)
    tasks = zip(episodes.split(1), predictions.split(1), strict=True)
    drawn = [_draw_task(one, p, shots, queries, letters=round(_LETTERS * width) + 2) for one, p in tasks]
    return np.vstack([np.hstack(drawn[i : i + 2]) for i in range(0, len(drawn), 2)] if in_pairs else drawn)


def _draw_task(episodes: Episodes, predictions: Tensor, shots: int, queries: int, *, letters: int) -> NDArray[np.uint8]:
    """Draw one task with that many columns; ``letters`` is the height of its texts in pixels."""
    support, query = episodes.support_x[0].cpu(), episodes.query_x[0].cpu()
    support_y, query_y = episodes.support_y[0].tolist(), episodes.query_y[0].tolist()
    predicted = predictions[0].argmax(dim=-1).tolist()
    ways = min(predictions.shape[-1], _MAX_ROWS)

    # An empty sheet with its headings.
    pitch, left_of_all, top_of_all = _CELL + _GAP, 8 + round(1.6 * letters), round(1.6 * letters)
    split = left_of_all + max(shots * pitch, 4 * letters) + 2 * _GAP
    width = split + max(queries * pitch, 8 * letters)
    sheet = Image.new("RGB", (width, top_of_all + ways * pitch), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=letters)
    draw.text((left_of_all, 2), "support", fill="black", font=font)
    correct = sum(p == y for p, y in zip(predicted, query_y, strict=True))
    draw.text((split, 2), f"queries: {correct} of {len(query_y)}", fill="black", font=font)

    # A row per class.
    for label in range(ways):
        top = top_of_all + label * pitch
        draw.text((8, top + (_CELL - letters) // 2), str(label), fill="black", font=font)
        for column, i in enumerate(i for i, y in enumerate(support_y) if y == label):
            sheet.paste(_to_cell(support[i]), (left_of_all + column * pitch, top))
        for column, i in enumerate([i for i, y in enumerate(query_y) if y == label][:queries]):
            left = split + column * pitch
            sheet.paste(_to_cell(query[i]), (left, top))
            colour = _CORRECT_COLOUR if predicted[i] == label else _WRONG_COLOUR
            draw.rectangle((left, top, left + _CELL - 1, top + _CELL - 1), outline=colour, width=3)
            if predicted[i] != label:
                box = draw.textbbox((left + 3, top), str(predicted[i]), font=font)
                draw.rectangle((left, top, box[2] + 3, box[3] + 3), fill=colour)
                draw.text((left + 3, top), str(predicted[i]), fill="white", font=font)
    return np.asarray(sheet)


def _to_cell(image: Tensor) -> Image.Image:
    pixels = (image.clamp(0, 1) * 255).byte().expand(3, -1, -1).permute(1, 2, 0).numpy()
    return Image.fromarray(pixels).resize((_CELL, _CELL), Image.Resampling.NEAREST)


def _draw_sinusoids(experiment: Experiment, params: Params, sampler: SinusoidSampler) -> NDArray[np.uint8]:
    """Draw sinusoids, their support points, and the network's function of x after 0, 1 and 10 inner steps."""
    from matplotlib.figure import Figure  # here, because only sinusoids need matplotlib

    from metalearn.training.tracking.plot_style import line_style

    # Adapt, and predict x in [-5, 5].
    tasks = sampler.tasks(0, _NUM_TASKS)
    x = torch.linspace(-5, 5, _SINUSOID_POINTS)
    inputs = x.to(experiment.device).view(1, -1, 1).expand(tasks.tasks, -1, 1)
    functions = []
    for k in _SINUSOID_STEPS:
        inner = experiment.algorithm.eval_inner(k)
        fast = adapt(experiment.forward, params, tasks.support_x, tasks.support_y, inner, loss=experiment.metric.loss)
        functions.append(predict(experiment.forward, fast, inputs).squeeze(-1).cpu())

    # A panel per task.
    figure = Figure(figsize=(13.0, 3.6), layout="constrained")
    for t in range(_NUM_TASKS):
        axes = figure.add_subplot(1, _NUM_TASKS, t + 1)
        amplitude, phase = sampler.curve(t)
        axes.plot(x, amplitude * torch.sin(x - phase), color="#666666", linewidth=3, alpha=0.5, label="the curve")
        for i, (k, y) in enumerate(zip(_SINUSOID_STEPS, functions, strict=True)):
            name = "before" if k == 0 else f"after {k} step{'s' if k > 1 else ''}"
            axes.plot(x, y[t], color=line_style(i).colour, dashes=line_style(i).dashes, label=name)
        axes.plot(tasks.support_x[t].cpu(), tasks.support_y[t].cpu(), "o", color="black", markersize=5, label="support")
        title = f"{amplitude:.1f} sin(x - {phase:.1f})"
        axes.set(xlabel="x", ylabel="y" if t == 0 else "", ylim=(-6.2, 6.2), title=title)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return np.asarray(Image.open(buffer).convert("RGB"))
