"""The plots of a comparison draw the results, and leave out what is missing."""

from __future__ import annotations

import dataclasses
import io
import itertools
import re
from collections.abc import Sequence
from typing import Any

import matplotlib.style
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from metalearn.commands.benchmark.settings import EngineCost
from metalearn.commands.compare.plots import PLOTS, plots
from metalearn.commands.compare.results import Results
from metalearn.training.tracking.plot_style import inline_svg, line_style, new_figure, stack_panels
from tests.commands.compare.factories import broken_variant, cost_rows, difference, results, two_orders, variant

LONG_NAMES = [f"engine-adjoint,task_chunk-{i}" for i in range(8)]


def draw(name: str, given: Results) -> Figure:
    figure = PLOTS[name].draw(given, PLOTS[name].title)
    assert figure is not None
    return figure


def line(axes: Axes, label: str) -> Line2D:
    (found,) = (each for each in axes.lines if each.get_label() == label)
    return found


def x_of(drawn: Line2D) -> list[float]:
    return [float(value) for value in np.asarray(drawn.get_xdata())]


def y_of(drawn: Line2D) -> list[float]:
    return [float(value) for value in np.asarray(drawn.get_ydata())]


def estimates(axes: Axes) -> list[tuple[float, float]]:
    """Return means and half-widths of horizontal intervals, in the order in which they were drawn."""
    found = []
    for container in axes.containers:
        assert isinstance(container, ErrorbarContainer)
        data, _, (bars,) = container.lines
        (low, _), (high, _) = bars.get_segments()[0]
        found.append((float(np.asarray(data.get_xdata())[0]), float(high - low) / 2))
    return found


def widths(axes: Axes) -> list[float]:
    return [patch.get_width() for patch in axes.patches if isinstance(patch, Rectangle)]


def faint_dots(axes: Axes) -> list[list[float]]:
    return [x_of(each) for each in axes.lines if each.get_alpha() is not None and each.get_marker() == "o"]


def legend_texts(figure: Figure) -> list[str]:
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def tick_labels(labels: Sequence[Any]) -> list[str]:
    return [label.get_text() for label in labels]


def test_every_plot_is_drawn_with_its_title() -> None:
    drawn = plots(two_orders())
    assert list(drawn) == list(PLOTS)
    for name, figure in drawn.items():
        assert figure.get_suptitle() == f"{PLOTS[name].title}\n" + figure.get_suptitle().split("\n")[1]
        assert "omniglot, 5-way 1-shot" in figure.get_suptitle()
        assert all(axes.get_xlabel() for axes in figure.axes)


def test_accuracy_by_both_protocols() -> None:
    (axes,) = draw("accuracy", two_orders()).axes
    assert estimates(axes) == [pytest.approx(pair) for pair in [(98.0, 0.9), (94.0, 1.2), (96.8, 0.9), (92.8, 1.2)]], (
        "transductive and non-transductive of the first variant, then of the second"
    )
    assert faint_dots(axes)[0] == pytest.approx([97.6, 98.1, 98.3])
    assert faint_dots(axes)[3] == pytest.approx([92.4, 92.9, 93.1])
    assert tick_labels(axes.get_yticklabels()) == ["second_order", "first_order"]


def test_accuracy_per_inner_step() -> None:
    from_none, from_one = draw("accuracy_per_step", two_orders()).axes
    assert y_of(line(from_none, "first_order")) == pytest.approx([20.0, 92.8, 94.8, 96.8])
    assert y_of(line(from_one, "first_order")) == pytest.approx([92.8, 94.8, 96.8])
    assert x_of(line(from_none, "first_order")) == pytest.approx([0, 1, 2, 3], abs=0.2), "side by side, near the step"
    assert x_of(line(from_none, "first_order")) != x_of(line(from_none, "second_order"))
    bars = from_one.collections[0]
    assert isinstance(bars, LineCollection)
    (low, high) = np.asarray(bars.get_segments()[0])[:, 1]
    assert (low, high) == pytest.approx((93.1, 94.9)), "94% ± 0.9% after the first step"


def test_curves_against_steps_and_time() -> None:
    given = two_orders()
    by_step, by_time = draw("validation", given).axes
    for each in given.variants:
        assert x_of(line(by_step, each.name)) == [point.iteration for point in each.curve]
        assert x_of(line(by_time, each.name)) == pytest.approx([point.training_s for point in each.curve])
        for axes in (by_step, by_time):
            assert y_of(line(axes, each.name)) == pytest.approx([100 * point.mean for point in each.curve])
            assert y_of(line(axes, "target, 95.0%")) == pytest.approx([95, 95])
    assert by_step.get_ylim() == by_time.get_ylim()
    band = by_step.collections[0].get_paths()[0].vertices
    assert np.asarray(band)[:, 1].max() == pytest.approx(100 * max(point.high for point in given.variants[0].curve))
    assert by_time.get_xlabel() == "training time, s"
    (cosine,) = draw("cosine", given).axes
    assert y_of(line(cosine, "first_order")) == [point.mean for point in given.variants[1].cosine]


@pytest.mark.parametrize(("factor", "unit", "last"), [(20.0, "min", 16.0), (1000.0, "h", 48 / 3.6)])
def test_time_unit_when_training_is_long(factor: float, unit: str, last: float) -> None:
    slow = variant("slow", ms=48.0 * factor)
    _, by_time = draw("validation", results([slow])).axes
    assert by_time.get_xlabel() == f"training time, {unit}"
    assert x_of(line(by_time, "slow"))[-1] == pytest.approx(last)


def test_validation_axis_shows_end_of_training_and_target() -> None:
    by_step, _ = draw("validation", dataclasses.replace(two_orders(), target_accuracy=0.999)).axes
    low, high = by_step.get_ylim()
    ends = [y_of(line(by_step, name))[10] for name in ("first_order", "second_order")]
    assert 20 < low < min(ends) - 0.35 * (high - low)
    assert high > 99.9


def test_overview_shows_gain_and_cost_over_first_order() -> None:
    gain, time, memory = draw("overview", two_orders((0.010, 0.012, 0.014), ci95=0.005)).axes
    assert estimates(gain) == [pytest.approx((1.2, 0.5))]
    assert faint_dots(gain) == [pytest.approx([1.0, 1.2, 1.4])]
    assert [0.0, 0.0] in [x_of(each) for each in gain.lines], "the line at zero"
    assert tick_labels(gain.get_yticklabels()) == ["second_order", "first_order"]
    assert [text.get_position()[1] for text in gain.texts] == [1], "the row of the baseline, first order"
    assert (time.get_xlabel(), memory.get_xlabel()) == ("ms per meta-gradient", "peak MiB")
    assert (widths(time), widths(memory)) == ([1500, 500], [800, 90]), "measured in turns at K = 5"
    assert [text.get_text() for text in time.texts] == ["1500 (3.00x)", "500"]


def test_overview_of_several_variants_is_over_the_first() -> None:
    first, better, worse = variant("a", ms=20.0), variant("b", ms=40.0), variant("c", ms=10.0)
    others = [difference(first, better, (-0.02, -0.04), 0.01), difference(first, worse, (0.05,), 0.02)]
    given = dataclasses.replace(results([first, better, worse], others), runs_at_a_time=2)
    gain, time, _ = draw("overview", given).axes
    assert estimates(gain) == [pytest.approx((3, 1)), pytest.approx((-5, 2))]
    assert [text.get_position()[1] for text in gain.texts] == [0]
    assert time.get_xlabel() == "ms per meta-step, rough"
    assert [text.get_text() for text in time.texts] == ["20.0", "40.0 (2.00x)", "10.0 (0.50x)"]


def test_cost_ends_at_the_limit() -> None:
    figure = draw("cost", dataclasses.replace(two_orders(), cost=cost_rows(limit_at=10), cost_limit_mib=1000))
    memory, time = figure.axes
    assert x_of(line(memory, "unroll")) == [1, 5]
    assert y_of(line(memory, "unroll")) == [274, 800]
    assert y_of(line(memory, "first order")) == [90, 90, 90, 90]
    assert y_of(line(time, "adjoint")) == [300, 1500, 3000, 6000]
    assert y_of(line(memory, "limit of memory, 1000 MiB")) == [1000, 1000]
    assert not any("limit" in str(each.get_label()) for each in time.lines)
    assert tick_labels(memory.get_xticklabels()) == ["1", "5", "10", "20"]
    assert memory.get_xscale() == memory.get_yscale() == "log"


def test_cost_has_no_limit_or_panel_without_data() -> None:
    untimed = [dataclasses.replace(row, median_ms=None) for row in cost_rows()]
    figure = draw("cost", dataclasses.replace(two_orders(), cost=untimed))
    (memory,) = figure.axes
    assert memory.get_ylabel() == "peak memory, MiB"
    assert legend_texts(figure) == ["first order", "unroll", "checkpoint", "adjoint"]


def test_cost_axis_spans_a_minimal_range() -> None:
    close = [EngineCost("unroll", False, None, 1, steps, 90.0 + steps, 30.0 + steps) for steps in (1, 2)]
    figure = draw("cost", dataclasses.replace(two_orders(), cost=close))
    for axes in figure.axes:
        low, high = axes.get_ylim()
        assert high / low > 7.9
        assert len([tick for tick in axes.get_yticks() if low <= tick <= high]) >= 2


def test_style_applies_to_new_figures_only() -> None:
    before = dict(matplotlib.rcParams)
    _, (axes,) = new_figure("title", "note")
    assert not axes.spines["top"].get_visible()
    assert dict(matplotlib.rcParams) == before
    with matplotlib.style.context("metalearn.metalearn"):
        assert matplotlib.rcParams["axes.spines.top"] is False, "the same file, found by name"


def test_variants_differ_in_colour_marker_and_dashes() -> None:
    assert all(len({line_style(i)[part] for i in range(8)}) == 8 for part in range(3))
    assert len({line_style(i) for i in range(24)}) == 24
    (axes,) = draw("cosine", results([variant(name) for name in LONG_NAMES])).axes
    assert [line(axes, name).get_color() for name in LONG_NAMES] == [line_style(i).colour for i in range(8)]
    assert [line(axes, name).get_marker() for name in LONG_NAMES] == [line_style(i).marker for i in range(8)]


def test_style_follows_position_when_another_variant_is_empty() -> None:
    second = variant("second_order")
    figure = draw("validation", results([broken_variant("first_order"), second]))
    assert line(figure.axes[0], "second_order").get_color() == line_style(1).colour


def test_one_seed_has_no_band() -> None:
    drawn = plots(two_orders((0.012,)))
    assert faint_dots(drawn["overview"].axes[0]) == [pytest.approx([1.2])]
    assert not drawn["validation"].axes[0].collections
    assert "one seed" in drawn["validation"].get_suptitle()
    assert "band" in draw("validation", two_orders()).get_suptitle()


def test_unfinished_variant_is_labelled() -> None:
    drawn = plots(results([variant("second_order"), broken_variant("first_order")]))
    assert "overview" not in drawn
    assert [text.get_text() for text in drawn["accuracy"].axes[0].texts] == ["no finished run"]
    assert legend_texts(drawn["validation"]) == ["second_order", "target, 95.0%"]


def many() -> Results:
    variants = [variant(name, 0.9 + 0.01 * i) for i, name in enumerate(LONG_NAMES)]
    others = [difference(variants[0], other, (0.01, 0.02, 0.03), 0.02) for other in variants[1:]]
    return results(variants, others, cost=cost_rows(limit_at=20))


@pytest.mark.parametrize("layout", ["wide", "narrow"])
@pytest.mark.parametrize("given", [many(), two_orders((0.01,)), results([variant("no $\\formula$")])])
def test_nothing_is_cut_off_or_overlaps(given: Results, layout: str) -> None:
    for name, figure in plots(given).items():
        if layout == "narrow":
            figure.suptitle("")  # a heading of the page
            stack_panels(figure)
            assert figure.get_figwidth() < 5
        figure.savefig(io.BytesIO(), format="png", dpi=50)
        width, height = figure.get_size_inches()
        low, high = figure.get_tightbbox().get_points()
        assert (low >= -0.01).all(), name
        assert (high <= np.array([width, height]) + 0.01).all(), name
        assert all(axes.get_position().height > (0.3 if layout == "wide" else 0.1) for axes in figure.axes), name
        for legend in figure.legends:
            top = legend.get_window_extent().y1
            boxes = [axes.get_tightbbox() for axes in figure.axes]
            assert all(box is not None and box.y0 >= top for box in boxes), f"{name}: the legend hides something"
        boxes = [axes.get_tightbbox() for axes in figure.axes]
        for box, other in itertools.combinations(filter(None, boxes), 2):
            assert not box.overlaps(other), f"{name}: two panels overlap"


def test_inline_picture_takes_the_colours_and_the_font_of_its_page() -> None:
    figure = draw("accuracy", two_orders())
    svg = inline_svg(figure, "first", 'a "title"', "wide")
    assert svg.startswith('<svg class="wide" role="img" aria-label="a &quot;title&quot;"')
    assert not re.search("(fill|stroke): #(000000|ffffff|666666|0072b2)", svg)
    assert "currentColor" in svg
    assert ">second_order</text>" in svg, "text, not outlines"
    found = re.findall(r' id="([^"]*)', svg)
    assert found
    assert all(name.startswith("first-") for name in found)
    used = re.findall(r'(?:href="#|url\(#)([^")]*)', svg)
    assert used
    assert set(used) <= set(found), "what refers to an id finds it"
