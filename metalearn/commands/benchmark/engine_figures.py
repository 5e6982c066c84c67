"""Plots of what was measured."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from metalearn.commands.benchmark.engine_settings import EngineCost
from metalearn.training.tracking.plot_style import GREY, line_style

# The engines' colours in a comparison's plots, ``compare/cost_plots.py``.
_COLOURS = {name: line_style(i).colour for i, name in enumerate(("unroll", "first order", "checkpoint", "adjoint"))}
_STYLES = {None: "-", 4: "--", 1: ":"}


def plot_memory(title: str, rows: Sequence[EngineCost], limit_mib: float) -> Figure:
    """Peak memory against the number of inner steps, a line for every engine and chunk."""
    figure = Figure(figsize=(9.0, 5.0), layout="constrained")
    axes = figure.add_subplot()
    names = list(dict.fromkeys(row.name for row in rows))
    for name in names:
        points = [row for row in rows if row.name == name and row.peak_mib is not None]
        if not points:
            continue
        first = points[0]
        colour = _COLOURS[first.engine if first.second_order else "first order"]
        axes.plot(
            [row.steps for row in points],
            [row.peak_mib or 0.0 for row in points],
            marker="x" if first.snapshot_every > 1 else "o",
            markersize=5,
            color=colour,
            linestyle=_STYLES.get(first.task_chunk, "-."),
            label=name if first.task_chunk else f"{name}, all tasks",
        )
    if any(row.peak_mib is None for row in rows):
        axes.axhline(limit_mib, color=GREY, linewidth=1)
        axes.annotate(f"limit, {limit_mib:.0f} MiB", (1, limit_mib), xytext=(0, -11), textcoords="offset points")
    axes.set(
        xlabel="inner steps K", ylabel="peak memory of a meta-gradient, MiB", title=title, xscale="log", yscale="log"
    )
    steps = sorted({row.steps for row in rows})
    axes.set_xticks(steps, [str(k) for k in steps])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small", frameon=False)
    return figure
