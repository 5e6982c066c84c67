"""The plots of a comparison, with their titles and captions; all data comes from its results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from metalearn.commands.benchmark.settings import EngineCost
from metalearn.commands.compare.results import CurvePoint, Results, VariantResult
from metalearn.commands.compare.tables import step_costs
from metalearn.core.text import format_number
from metalearn.training.evaluation import MeanCI
from metalearn.training.tracking.plot_style import (
    ENGINE_STYLES,
    GREY,
    draw_estimate,
    draw_line,
    label_rows,
    legend_below,
    legend_handle,
    limit_to_percent,
    line_style,
    metalearn_style,
    new_figure,
    set_log_axes,
    to_percent,
)

INTERVAL = (
    "95% intervals cover seeds and tasks: Student's t over the means of the seeds, since each seed draws its own "
    "parameters and tasks. They are never narrower than the interval over the test tasks, which is the only one that a "
    "single seed has. An interval that would pass 0 or 100% is given by its ends, cut there."
)

_STEP_OFFSET = 0.3  # width of a group of variants, as a share of the distance between two inner steps
_MARKS_ON_A_CURVE = 8
_MIN_ACCURACY_RANGE = 0.02  # so that noise is not blown up
_MIN_LOG_RANGE = 8.0  # highest to lowest on a logarithmic axis, so that small differences look small
_SECONDS_UP_TO, _MINUTES_UP_TO = 300, 3 * 3600


@metalearn_style()
def plots(results: Results) -> dict[str, Figure]:
    """Draw every plot that has data, by name, in the order of ``PLOTS``."""
    drawn = {name: plot.draw(results, plot.title) for name, plot in PLOTS.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def plot_overview(results: Results, title: str) -> Figure | None:
    """Plot what each variant gains in test accuracy over a baseline, beside the time and memory of its steps.

    Of two variants the baseline is first order, or else the second; of several it is the first.
    """
    if not results.differences:
        return None
    names, costs = [variant.name for variant in results.variants], step_costs(results)
    pair = results.orders or results.variants
    baseline = names.index(pair[1].name) if len(names) == 2 else 0
    both = {f"ms per {costs.step}{', rough' if costs.is_rough else ''}": costs.ms, "peak MiB": costs.mib}
    measured = {label: values for label, values in both.items() if any(value is not None for value in values)}
    figure, panels = new_figure(title, results.title, height=1.6 + 0.5 * len(names), panels=1 + len(measured))
    for panel in panels:
        label_rows(panel, names)
        panel.tick_params(labelleft=panel is panels[0])
    _draw_gains(panels[0], results, baseline)
    panels[0].set_xlabel("accuracy gain, points")
    for panel, (label, values) in zip(panels[1:], measured.items(), strict=True):
        _draw_bars(panel, values, values[baseline])
        panel.set_xlabel(label)
    return figure


def _draw_gains(axes: Axes, results: Results, baseline: int) -> None:
    """Draw each variant's difference from the baseline with its interval; the baseline is a line at zero."""
    names = [variant.name for variant in results.variants]
    for each in results.differences:
        sign = 1 if each.other == names[baseline] else -1
        row = names.index(each.first if sign == 1 else each.other)
        percent = to_percent(MeanCI(sign * each.accuracy.mean, each.accuracy.ci95))
        seeds = [100 * sign * value for value in each.per_seed]
        draw_estimate(axes, row, percent, seeds, line_style(row), lowest=-100)
    axes.axvline(0, color=GREY, linewidth=1, zorder=0)
    axes.text(0, baseline, "  baseline", color=GREY, va="center")
    limit_to_percent(axes, "x", lowest=-100)


def _draw_bars(axes: Axes, values: Sequence[float | None], baseline: float | None) -> None:
    """Draw a bar per row, labelled with its value and, but for the baseline's, how many times that it is."""
    for row, value in enumerate(values):
        if value is None:
            axes.text(0.01, row, "not measured", transform=axes.get_yaxis_transform(), color=GREY, va="center")
            continue
        ratio = f" ({value / baseline:.2f}x)" if baseline and value != baseline else ""
        bar = axes.barh(row, value, height=0.5, color=line_style(row).colour)
        axes.bar_label(bar, [f"{format_number(value)}{ratio}"], padding=3)
    axes.set_xlim(0, 1.65 * max(value for value in values if value is not None))  # with the labels


def plot_accuracy(results: Results, title: str) -> Figure | None:
    """Plot the test accuracy of each variant by both protocols, with 95% intervals and a dot per seed."""
    if not any(variant.accuracy for variant in results.variants):
        return None
    height = 2.2 + 0.65 * len(results.variants)
    figure, (axes,) = new_figure(title, f"{results.title}; bars: 95% intervals", height=height)
    label_rows(axes, [variant.name for variant in results.variants])
    for row, variant in enumerate(results.variants):
        if variant.accuracy is None:
            axes.text(0.01, row, "no finished run", transform=axes.get_yaxis_transform(), color=GREY, va="center")
        for estimate, metric, hollow in (
            (variant.accuracy, "test.accuracy", False),
            (variant.nontransductive, "test.accuracy_nontransductive", True),
        ):
            if estimate is not None:
                values = [run.metrics.get(metric) for run in variant.finished]
                seeds = [100 * value for value in values if value is not None]
                offset = 0.1 if hollow else -0.1
                draw_estimate(axes, row + offset, to_percent(estimate), seeds, line_style(row), hollow=hollow)
    limit_to_percent(axes, "x")
    axes.set_xlabel("test accuracy, %")
    entries = {"transductive": legend_handle(), "non-transductive": legend_handle(hollow=True)}
    legend_below(figure, {**entries, "a seed": legend_handle(seed=True)})
    return figure


def plot_accuracy_per_step(results: Results, title: str) -> Figure | None:
    """Plot test accuracy after 0, 1, ... inner steps, and again from step 1 on, as the first step dwarfs the others."""
    drawn = [(i, variant) for i, variant in enumerate(results.variants) if variant.per_step]
    if not drawn:
        return None
    figure, panels = new_figure(title, f"{results.title}; bars: 95% intervals", panels=2)
    for nth, (i, variant) in enumerate(drawn):
        offset = _STEP_OFFSET * (nth - (len(drawn) - 1) / 2) / len(drawn)
        percent = [to_percent(estimate) for estimate in variant.per_step]
        for first, axes in enumerate(panels):
            x = [step + offset for step in range(first, len(percent))]
            means, ends = [each.mean for each in percent[first:]], [each.ends(0, 100) for each in percent[first:]]
            draw_line(axes, x, means, line_style(i), variant.name)
            axes.vlines(x, [low for low, _ in ends], [high for _, high in ends], line_style(i).colour, linewidth=1)
    for axes in panels:
        limit_to_percent(axes, "y")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    panels[0].set(xlabel="inner steps at test", ylabel="test accuracy, %")
    panels[1].set_xlabel("inner steps at test, from the first on (another scale)")
    legend_below(figure)
    return figure


def plot_validation(results: Results, title: str) -> Figure | None:
    """Plot validation accuracy against meta-steps and against time."""
    curves = [(i, variant, variant.curve) for i, variant in enumerate(results.variants) if variant.curve]
    if not curves:
        return None
    figure, (by_step, by_time) = new_figure(title, f"{results.title}; {_describe_band(results)}", panels=2)
    longest = max(points[-1].training_s for _, _, points in curves)
    seconds, unit = 3600, "h"
    if longest <= _MINUTES_UP_TO:
        seconds, unit = (1, "s") if longest <= _SECONDS_UP_TO else (60, "min")
    _draw_curves(by_step, curves, lambda point: point.iteration, scale=100)
    _draw_curves(by_time, curves, lambda point: point.training_s / seconds, scale=100)
    by_time.sharey(by_step)
    by_time.tick_params(labelleft=False)
    by_step.set(xlabel="meta-steps", ylabel="validation accuracy, %")
    by_time.set_xlabel(f"training time, {unit}")
    if results.target_accuracy is not None:
        target = 100 * results.target_accuracy
        for axes in (by_step, by_time):
            axes.axhline(target, color=GREY, linewidth=0.8, zorder=1, label=f"target, {target:.1f}%")
    by_step.set_ylim(bottom=_lower_limit([points for _, _, points in curves], results.target_accuracy))
    limit_to_percent(by_step, "y")
    legend_below(figure)
    return figure


def plot_cosine(results: Results, title: str) -> Figure | None:
    """Plot the cosine between the first- and the second-order meta-gradient during training."""
    curves = [(i, variant, variant.cosine) for i, variant in enumerate(results.variants) if variant.cosine]
    if not curves:
        return None
    figure, (axes,) = new_figure(title, f"{results.title}; {_describe_band(results)}")
    _draw_curves(axes, curves, lambda point: point.iteration, scale=1)
    axes.set(xlabel="meta-steps", ylabel="cosine, first against second order")
    legend_below(figure)
    return figure


def _draw_curves(
    axes: Axes,
    curves: Sequence[tuple[int, VariantResult, Sequence[CurvePoint]]],
    x_of: Callable[[CurvePoint], float],
    *,
    scale: float,
) -> None:
    """Draw a line per variant, in the style of its position, and a band over its seeds."""
    for i, variant, points in curves:
        x = [x_of(point) for point in points]
        marks = max(1, len(points) // _MARKS_ON_A_CURVE)
        draw_line(axes, x, [scale * point.mean for point in points], line_style(i), variant.name, marks=marks)
        low, high = [scale * point.low for point in points], [scale * point.high for point in points]
        if low != high:
            axes.fill_between(x, low, high, color=line_style(i).colour, alpha=0.15, linewidth=0)


def _lower_limit(curves: Sequence[Sequence[CurvePoint]], target: float | None) -> float | None:
    """Return where the vertical axis begins, in percent; ``None`` for everything.

    The second half of training, and the target, get at least the upper half of the axis; the steep start may be cut.
    """
    ends = [point for points in curves for point in points[len(points) // 2 :]]
    targets = [] if target is None else [target]
    low, high = min([point.low for point in ends] + targets), max([point.high for point in ends] + targets)
    bottom = low - max(high - low, _MIN_ACCURACY_RANGE)
    return 100 * bottom if bottom > min(point.low for points in curves for point in points) else None


def _describe_band(results: Results) -> str:
    if max(len(variant.finished) for variant in results.variants) < 2:
        return "one seed"
    return "line: mean over seeds, band: lowest to highest seed"


def plot_cost(results: Results, title: str) -> Figure | None:
    """Plot peak memory and time of one meta-gradient against the number of inner steps."""
    rows = results.cost
    metrics: dict[str, Callable[[EngineCost], float | None]] = {
        "peak memory, MiB": lambda row: row.peak_mib,
        "time, ms (median)": lambda row: row.median_ms,
    }
    measured = {label: of for label, of in metrics.items() if any(of(row) is not None for row in rows)}
    if not measured:
        return None
    figure, panels = new_figure(title, results.title, panels=len(measured))
    for axes, (label, of) in zip(panels, measured.items(), strict=True):
        for position, name in enumerate(dict.fromkeys(row.name for row in rows)):
            points = [(row.steps, value) for row in rows if row.name == name and (value := of(row)) is not None]
            if points:
                x, y = zip(*sorted(points), strict=True)
                draw_line(axes, x, y, ENGINE_STYLES.get(name, line_style(position)), name)
        if "memory" in label and any(row.peak_mib is None for row in rows):
            limit = results.cost_limit_mib
            axes.axhline(limit, color=GREY, linewidth=0.8, label=f"limit of memory, {limit:g} MiB")
        axes.set_ylabel(label)
        set_log_axes(axes, "inner steps K", sorted({row.steps for row in rows}))
        low, high = axes.get_ylim()
        widen = max(1.0, _MIN_LOG_RANGE * low / high) ** 0.5
        axes.set_ylim(low / widen, high * widen)
    legend_below(figure)
    return figure


class Plot(NamedTuple):
    """A plot: its title, its caption in the report, and the function that draws it if there is data."""

    title: str
    text: str
    draw: Callable[[Results, str], Figure | None]


PLOTS = {
    "overview": Plot(
        "What is gained, and what it costs",
        "The gain is in test accuracy over the baseline on the same seeds, with its 95% interval; dots are seeds. If "
        "the bar crosses the line, it is not known which of the two is better.",
        plot_overview,
    ),
    "accuracy": Plot(
        "Test accuracy of each variant",
        "Filled: transductive, the queries of a task are predicted as one batch. Hollow: non-transductive, each query "
        "is predicted without the others. Bars are 95% intervals, faint dots are seeds.",
        plot_accuracy,
    ),
    "accuracy_per_step": Plot(
        "Test accuracy after each inner step",
        "First from step 0, the model before it has seen the task, then from step 1, on another scale. Points of the "
        "same step are drawn side by side, so that their bars, 95% intervals, do not hide one another.",
        plot_accuracy_per_step,
    ),
    "validation": Plot(
        "Validation accuracy during training",
        "The line is the mean over seeds; the band reaches from the lowest to the highest seed. The vertical axis may "
        "begin above the start of training, so that its end can be read.",
        plot_validation,
    ),
    "cost": Plot(
        "Cost of one meta-gradient against the inner steps",
        "First order, and second order by each engine, on all tasks at once, measured in turns. Both axes are "
        "logarithmic. A line ends where the peak exceeded the limit.",
        plot_cost,
    ),
    "cosine": Plot(
        "Agreement of the first- with the second-order meta-gradient",
        "Cosine of the angle between the two on the same tasks: at 1 they point the same way, at 0 they are unrelated.",
        plot_cosine,
    ),
}
