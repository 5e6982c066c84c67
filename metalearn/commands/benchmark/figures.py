"""Plots of the benchmark: speeds side by side, and how cost grows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from metalearn.commands.benchmark.contenders import order_name
from metalearn.commands.benchmark.measure import BenchmarkResult
from metalearn.commands.benchmark.slopes import SweepSeries
from metalearn.training.tracking.plot_style import GREY, draw_line, escape_mathtext, label_rows, line_style, new_figure


def plot_speed(rows_of: Mapping[str, Sequence[BenchmarkResult]], against: str) -> Figure:
    """Bars of speed, whiskers from quartile to quartile: a panel for each setting, second order above first.

    Args:
        rows_of: by the setting's title.
        against: whose speed is 1.
    """
    most = max(len(rows) for rows in rows_of.values())
    figure, panels = new_figure(
        "How many times faster a meta-gradient is", f"than {against}'s on the same tasks", height=2 + 0.33 * most,
        panels=len(rows_of),
    )  # fmt: skip
    for panel, (title, rows) in zip(panels, rows_of.items(), strict=True):
        libraries = list(dict.fromkeys(row.who for row in rows))
        for position, row in enumerate(rows):
            low, high = row.speed_quartiles
            bars = panel.barh(
                position,
                row.speed,
                xerr=[[max(0.0, row.speed - low)], [max(0.0, high - row.speed)]],
                height=0.6,
                color=line_style(libraries.index(row.who)).colour,
                alpha=1.0 if row.second_order else 0.6,
                error_kw={"linewidth": 0.8, "ecolor": GREY},
            )
            panel.bar_label(bars, fmt=f"{row.speed:.2f}", padding=3, fontsize="small")
        panel.axvline(1, color=GREY, linewidth=0.8)
        first = panel is panels[0]
        label_rows(panel, [f"{row.who}, {order_name(row.second_order)}" if first else "" for row in rows])
        panel.set_title(escape_mathtext(title.replace(", conv4", ",\nconv4")), fontsize="small")
        panel.set_xlabel(f"speed, {against} = 1")
        panel.margins(x=0.2)  # for the numbers at the ends of the bars
    return figure


def plot_sweep(axis: str, lines: Sequence[SweepSeries], title: str, note: str) -> Figure:
    """Time and peak memory against what is swept, both on logarithmic axes, with slopes in the legends.

    Args:
        axis: what is swept.
        lines: a contender each.
        title: what is seen.
        note: what was held.
    """
    figure, (time, memory) = new_figure(title, note, panels=2)
    for position, line in enumerate(lines):
        at = line_style(position)
        draw_line(time, line.values, line.median_ms, at, f"{line.name}: slope {line.slope_ms:.2f}")
        draw_line(memory, line.values, line.peak_mib, at, f"{line.name}: slope {line.slope_mib:.2f}")
    time.set_ylabel("time of a meta-gradient, ms (median)")
    memory.set_ylabel("peak memory, MiB")
    for panel in (time, memory):
        _scale(panel, axis, lines[0].values)
        panel.legend(fontsize="small", frameon=False)
    return figure


def _scale(axes: Axes, axis: str, values: Sequence[int]) -> None:
    axes.set(xscale="log", yscale="log", xlabel=axis)
    axes.set_xticks(values, [str(value) for value in values])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
