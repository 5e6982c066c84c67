"""The plots of a comparison, from its results alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from metalearn.commands.compare.captions import CAPTIONS
from metalearn.commands.compare.cost_plots import cost, plot_per_run_cost
from metalearn.commands.compare.results import CurvePoint, Results, VariantResult
from metalearn.training.evaluation import MeanCI
from metalearn.training.tracking.plot_style import (
    GREY,
    NEUTRAL,
    LineStyle,
    draw_estimate,
    draw_line,
    label_rows,
    legend_below,
    legend_handle,
    line_style,
    new_figure,
    to_percent,
)

_SIDE_BY_SIDE = 0.3  # of the distance between two inner steps
_MARKS_ON_A_CURVE = 8
_LEAST_RANGE = 0.02  # of accuracies, so that noise is not blown up
_SECONDS_UP_TO, _MINUTES_UP_TO = 300, 3 * 3600


def plots(results: Results) -> dict[str, Figure]:
    """By name, in the order of the report; one that has no data is left out."""
    draw: dict[str, Callable[[Results], Figure | None]] = {
        "accuracy": plot_accuracy,
        "difference": plot_difference,
        "accuracy_per_step": accuracy_per_step,
        "validation": plot_validation,
        "per_run_cost": plot_per_run_cost,
        "cost": cost,
        "cosine": plot_cosine,
    }
    drawn = {name: function(results) for name, function in draw.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def plot_accuracy(results: Results) -> Figure | None:
    """Test accuracy of each variant by both protocols, with 95% intervals and a dot per seed."""
    if not any(variant.accuracy for variant in results.variants):
        return None
    height = 2.2 + 0.65 * len(results.variants)
    figure, (axes,) = new_figure(CAPTIONS["accuracy"].title, results.title, height=height)
    label_rows(axes, [variant.name for variant in results.variants])
    for row, variant in enumerate(results.variants):
        if variant.accuracy is None:
            _say_nothing_finished(axes, row)
            continue
        seeds = _of_seeds(variant, "test.accuracy")
        draw_estimate(axes, row - 0.1, to_percent(variant.accuracy), seeds, line_style(row), hollow=False)
        if variant.nontransductive is not None:
            seeds = _of_seeds(variant, "test.accuracy_nontransductive")
            draw_estimate(axes, row + 0.1, to_percent(variant.nontransductive), seeds, line_style(row), hollow=True)
    axes.set_xlabel("test accuracy, % (bar: 95% interval)")
    legend_below(
        figure,
        [
            legend_handle("transductive"),
            legend_handle("non-transductive", hollow=True),
            legend_handle("a seed", seed=True),
        ],
    )
    return figure


def _of_seeds(variant: VariantResult, metric: str) -> list[float]:
    values = [run.metrics.get(metric) for run in variant.finished]
    return [100 * value for value in values if value is not None]


def _say_nothing_finished(axes: Axes, row: int) -> None:
    axes.text(0.01, row, "no finished run", transform=axes.get_yaxis_transform(), color=GREY, va="center")


def plot_difference(results: Results) -> Figure | None:
    """Each difference in percentage points, with its 95% interval, a dot per seed, and zero."""
    if not results.differences:
        return None
    height = 2.2 + 0.6 * len(results.differences)
    figure, (axes,) = new_figure(CAPTIONS["difference"].title, results.title, height=height)
    label_rows(axes, [f"{each.first}\nminus {each.other}" for each in results.differences])
    for row, each in enumerate(results.differences):
        seeds = [100 * value for value in each.per_seed]
        draw_estimate(axes, row, to_percent(each.accuracy), seeds, NEUTRAL, hollow=False)
    axes.axvline(0, color=GREY, linewidth=1, zorder=0)
    axes.set_xlabel("test accuracy, percentage points (right of zero: the first named is ahead)")
    legend_below(figure, [legend_handle("mean and 95% interval"), legend_handle("a seed", seed=True)])
    return figure


def accuracy_per_step(results: Results) -> Figure | None:
    """Test accuracy after 0, 1, ... inner steps, a line a variant."""
    shown = [(i, variant) for i, variant in enumerate(results.variants) if variant.per_step]
    if not shown:
        return None
    figure, (from_none, from_one) = new_figure(CAPTIONS["accuracy_per_step"].title, results.title, panels=2)
    for nth, (i, variant) in enumerate(shown):
        aside = _SIDE_BY_SIDE * (nth - (len(shown) - 1) / 2) / len(shown)
        percent = [to_percent(estimate) for estimate in variant.per_step]
        _draw_steps(from_none, percent, aside, line_style(i), variant.name, first=0)
        _draw_steps(from_one, percent, aside, line_style(i), variant.name, first=1)
    for axes in (from_none, from_one):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    from_none.set(xlabel="inner steps at test", ylabel="test accuracy, % (bar: 95% interval)")
    from_one.set_xlabel("inner steps at test, from the first on (another scale)")
    legend_below(figure)
    return figure


def _draw_steps(axes: Axes, percent: Sequence[MeanCI], aside: float, at: LineStyle, name: str, *, first: int) -> None:
    """From the ``first`` inner step on: the large gain of the first would hide what the later ones add."""
    x = [step + aside for step in range(first, len(percent))]
    means, halves = [each.mean for each in percent[first:]], [each.ci95 for each in percent[first:]]
    draw_line(axes, x, means, at, name)
    axes.errorbar(x, means, yerr=halves, fmt="none", ecolor=at.colour, elinewidth=1, capsize=2)


def plot_validation(results: Results) -> Figure | None:
    """Validation accuracy against meta-steps and against time."""
    curves = _curves(results, lambda variant: variant.curve)
    if not curves:
        return None
    figure, (by_step, by_time) = new_figure(
        CAPTIONS["validation"].title, f"{results.title}; {_band_in_words(results)}", panels=2
    )
    seconds, unit = _time_unit(max(points[-1].training_s for _, _, points in curves))
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
    by_step.set_ylim(bottom=_below_the_end(curves, results.target_accuracy))
    legend_below(figure)
    return figure


def plot_cosine(results: Results) -> Figure | None:
    """Cosine between the first- and the second-order meta-gradient during training."""
    curves = _curves(results, lambda variant: variant.cosine)
    if not curves:
        return None
    figure, (axes,) = new_figure(CAPTIONS["cosine"].title, f"{results.title}; {_band_in_words(results)}")
    _draw_curves(axes, curves, lambda point: point.iteration, scale=1)
    axes.set(xlabel="meta-steps", ylabel="cosine, first against second order")
    legend_below(figure)
    return figure


_Curves = Sequence[tuple[int, str, Sequence[CurvePoint]]]


def _curves(results: Results, of: Callable[[VariantResult], Sequence[CurvePoint]]) -> _Curves:
    """Position, name and points of the variants that have some."""
    return [(i, variant.name, of(variant)) for i, variant in enumerate(results.variants) if of(variant)]


def _draw_curves(axes: Axes, curves: _Curves, x_of: Callable[[CurvePoint], float], *, scale: float) -> None:
    for i, name, points in curves:
        x = [x_of(point) for point in points]
        marks = max(1, len(points) // _MARKS_ON_A_CURVE)
        draw_line(axes, x, [scale * point.mean for point in points], line_style(i), name, marks=marks)
        low, high = [scale * point.low for point in points], [scale * point.high for point in points]
        if low != high:
            axes.fill_between(x, low, high, color=line_style(i).colour, alpha=0.15, linewidth=0)


def _below_the_end(curves: _Curves, target: float | None) -> float | None:
    """Where the vertical axis begins, in percent, so that the steep start does not flatten all that follows it.

    The second half of training, and the target, take up its upper half at least.
    """
    ends = [point for _, _, points in curves for point in points[len(points) // 2 :]]
    low, high = min(point.low for point in ends), max(point.high for point in ends)
    if target is not None:
        low, high = min(low, target), max(high, target)
    bottom = low - max(high - low, _LEAST_RANGE)
    lowest = min(point.low for _, _, points in curves for point in points)
    return 100 * bottom if bottom > lowest else None


def _band_in_words(results: Results) -> str:
    if max(len(variant.finished) for variant in results.variants) < 2:
        return "one seed"
    return "line: mean over seeds, band: lowest to highest seed"


def _time_unit(longest_s: float) -> tuple[float, str]:
    if longest_s <= _SECONDS_UP_TO:
        return 1, "s"
    return (60, "min") if longest_s <= _MINUTES_UP_TO else (3600, "h")
