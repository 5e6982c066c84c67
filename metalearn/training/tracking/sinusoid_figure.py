"""Sinusoids as a network sees them: the curve, the points that it adapts to, and its function before and after."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from metalearn.core.types import Episodes, Params
from metalearn.data.sinusoid import SinusoidSampler
from metalearn.inner import adapt, predict
from metalearn.training.experiment import Experiment
from metalearn.training.tracking.plot_style import line_style

STEPS = (0, 1, 10)
_TASKS = 4
_POINTS = 200


@torch.no_grad()
def functions(experiment: Experiment, params: Params, tasks: Episodes, steps: Sequence[int]) -> list[Tensor]:
    """What the network computes of x in [-5, 5] after so many inner steps, each ``[T, points]``."""
    x = torch.linspace(-5, 5, _POINTS, device=experiment.device).view(1, -1, 1).expand(tasks.tasks, -1, 1)
    found = []
    for k in steps:
        inner = experiment.algorithm.eval_inner(k)
        fast = adapt(experiment.forward, params, tasks.support_x, tasks.support_y, inner, loss=experiment.score.loss)
        found.append(predict(experiment.forward, fast, x).squeeze(-1).cpu())
    return found


def sinusoid_figure(experiment: Experiment, params: Params) -> Figure:
    """Validation tasks side by side: before, after 1 and after 10 inner steps."""
    sampler = experiment.validation
    assert isinstance(sampler, SinusoidSampler), "other tasks are shown as images"
    tasks = sampler.tasks(0, _TASKS)
    x = torch.linspace(-5, 5, _POINTS)
    drawn = functions(experiment, params, tasks, STEPS)
    figure = Figure(figsize=(13.0, 3.6), layout="constrained")
    for t in range(_TASKS):
        axes = figure.add_subplot(1, _TASKS, t + 1)
        amplitude, phase = sampler.curve(t)
        axes.plot(x, amplitude * torch.sin(x - phase), color="#666666", linewidth=3, alpha=0.5, label="the curve")
        for i, (k, y) in enumerate(zip(STEPS, drawn, strict=True)):
            name = "before" if k == 0 else f"after {k} step{'s' if k > 1 else ''}"
            axes.plot(x, y[t], color=line_style(i).colour, dashes=line_style(i).dashes, label=name)
        support = tasks.support_x[t].cpu(), tasks.support_y[t].cpu()
        axes.plot(*support, "o", color="black", markersize=5, label="support")
        axes.set(
            xlabel="x", ylabel="y" if t == 0 else "", ylim=(-6.2, 6.2), title=f"{amplitude:.1f} sin(x - {phase:.1f})"
        )
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure
