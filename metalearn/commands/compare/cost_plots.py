"""The plots of what a comparison costs: the engines side by side, and the runs as they measured themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from metalearn.commands.benchmark.engine_settings import EngineCost
from metalearn.commands.compare.captions import CAPTIONS
from metalearn.commands.compare.results import Results
from metalearn.commands.compare.summary import format_number
from metalearn.training.tracking.plot_style import GREY, draw_line, label_rows, legend_below, line_style, new_figure

# By default second order, which is unroll's, is the first variant and first order the second: the same look everywhere.
_ENGINE_LOOKS = {name: line_style(i) for i, name in enumerate(("unroll", "first order", "checkpoint", "adjoint"))}
_LEAST_RANGE = 8.0  # of a logarithmic axis, highest to lowest, so that small differences look small


def _peak_mib(row: EngineCost) -> float | None:
    return row.peak_mib


def _median_ms(row: EngineCost) -> float | None:
    return row.median_ms


def cost(results: Results) -> Figure | None:
    """Peak memory and time of one meta-gradient against the number of inner steps."""
    rows = results.cost
    panels = [("peak memory, MiB", _peak_mib), ("time, ms (median)", _median_ms)]
    shown = [(label, value) for label, value in panels if any(value(row) is not None for row in rows)]
    if not shown:
        return None
    figure, axes_of_panels = new_figure(CAPTIONS["cost"].title, results.title, panels=len(shown))
    for axes, (label, value) in zip(axes_of_panels, shown, strict=True):
        _draw_rows(axes, rows, value)
        if value is _peak_mib and any(row.peak_mib is None for row in rows):
            limit = results.cost_limit_mib
            axes.axhline(limit, color=GREY, linewidth=0.8, label=f"limit of memory, {limit:g} MiB")
        axes.set_ylabel(label)
        _scale_logarithmically(axes, sorted({row.steps for row in rows}))
    legend_below(figure)
    return figure


def _draw_rows(axes: Axes, rows: Sequence[EngineCost], value: Callable[[EngineCost], float | None]) -> None:
    for position, name in enumerate(dict.fromkeys(row.name for row in rows)):
        points = [(row.steps, found) for row in rows if row.name == name and (found := value(row)) is not None]
        if points:
            x, y = zip(*sorted(points), strict=True)
            draw_line(axes, x, y, _ENGINE_LOOKS.get(name, line_style(position)), name)


def _scale_logarithmically(axes: Axes, steps: Sequence[int]) -> None:
    axes.set(xscale="log", yscale="log", xlabel="inner steps K")
    axes.set_xticks(steps, [str(k) for k in steps])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    low, high = axes.get_ylim()
    widen = max(1.0, _LEAST_RANGE * low / high) ** 0.5
    axes.set_ylim(low / widen, high * widen)


def plot_per_run_cost(results: Results) -> Figure | None:
    """Milliseconds of a meta-step and peak memory of each variant's runs."""
    variants = results.variants
    if not any(variant.meta_step_ms is not None or variant.peak_mib is not None for variant in variants):
        return None
    height = 1.8 + 0.45 * len(variants)
    figure, (time, memory) = new_figure(CAPTIONS["per_run_cost"].title, results.title, height=height, panels=2)
    _draw_bars(time, [variant.meta_step_ms for variant in variants])
    _draw_bars(memory, [variant.peak_mib for variant in variants])
    label_rows(time, [variant.name for variant in variants])
    label_rows(memory, [""] * len(variants))
    time.set_xlabel("time of a meta-step, ms (median)")
    memory.set_xlabel("peak memory, MiB")
    return figure


def _draw_bars(axes: Axes, values: Sequence[float | None]) -> None:
    for row, value in enumerate(values):
        if value is None:
            axes.text(0.01, row, "no figure", transform=axes.get_yaxis_transform(), color=GREY, va="center")
            continue
        axes.bar_label(axes.barh(row, value, height=0.5, color=line_style(row).colour), fmt=format_number, padding=3)
    axes.margins(x=0.18)  # for the numbers at the ends of the bars
