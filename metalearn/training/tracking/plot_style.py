"""Helpers for plots in the style of ``metalearn.mplstyle``: line styles, panels, legends and intervals."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

import metalearn
from metalearn.training.evaluation import MeanCI

GREY = "#666666"
_FILE = Path(metalearn.__file__).with_name("metalearn.mplstyle")
_STYLE = matplotlib.rc_params_from_file(_FILE, use_default_template=False)
_COLOURS = _STYLE["axes.prop_cycle"].by_key()["color"]
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<")  # one more than colours: the ninth line differs from the first
_DASHES = ((), (5, 2), (6, 2, 1, 2), (1, 1.5), (10, 3), (3, 1, 1, 1, 1, 1), (2, 3), (10, 2, 2, 2, 2, 2))
_WIDTH = 9.0  # inches
_LEGEND_CHARACTERS = 100  # per line of a legend


class LineStyle(NamedTuple):
    """Colour, marker and dashes of a line; ``dashes`` are lengths of ink and of gaps in line widths, empty if solid."""

    colour: str
    marker: str
    dashes: tuple[float, ...]


NEUTRAL = LineStyle("#444444", "o", ())
"""For data that belongs to no single variant."""


@contextmanager
def metalearn_style() -> Iterator[None]:
    """Draw in the project's style; a context manager or a decorator."""
    with matplotlib.rc_context(_STYLE):
        yield


def line_style(position: int) -> LineStyle:
    """Return the style of the line at a position; any two of the first 72 differ."""
    return LineStyle(
        _COLOURS[position % len(_COLOURS)], _MARKERS[position % len(_MARKERS)], _DASHES[position % len(_DASHES)]
    )


# By default the first variant of a comparison is second order, as unroll computes it, and the second first order.
ENGINE_STYLES = {name: line_style(i) for i, name in enumerate(("unroll", "first order", "checkpoint", "adjoint"))}


def escape_mathtext(text: str) -> str:
    """Escape dollar signs, so that matplotlib does not read the text as a formula."""
    return text.replace("$", r"\$")


@metalearn_style()
def new_figure(title: str, note: str, *, height: float = 4.8, panels: int = 1) -> tuple[Figure, list[Axes]]:
    """Return a figure, ``height`` inches high, and its panels, which stand side by side with scales of their own."""
    figure = Figure(figsize=(_WIDTH, height))
    figure.suptitle(f"{escape_mathtext(title)}\n{escape_mathtext(note)}")
    axes = [figure.add_subplot(1, panels, panel + 1) for panel in range(panels)]
    for panel in axes:
        panel.grid(alpha=_STYLE["grid.alpha"])  # matplotlib creates grid lines when it draws, outside of the style
    return figure, axes


def label_rows(axes: Axes, names: Sequence[str]) -> None:
    """Use the vertical axis for one row per name, from top to bottom."""
    axes.set_yticks(range(len(names)), [escape_mathtext(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)


def set_log_axes(axes: Axes, xlabel: str, ticks: Sequence[int]) -> None:
    """Make both axes logarithmic, with ticks at the values on the horizontal one and at 1, 2, 5, ... on the other."""
    axes.set(xscale="log", yscale="log", xlabel=xlabel)
    axes.set_xticks(ticks, [str(value) for value in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


@metalearn_style()
def draw_line(axes: Axes, x: Sequence[float], y: Sequence[float], at: LineStyle, name: str, *, marks: int = 1) -> None:
    """Draw a line in a style, with a marker on every ``marks``-th point."""
    label = escape_mathtext(name)
    (line,) = axes.plot(x, y, color=at.colour, marker=at.marker, markevery=marks, label=label)
    if at.dashes:
        line.set_dashes(at.dashes)


@metalearn_style()
def draw_estimate(
    axes: Axes, row: float, percent: MeanCI, seeds: Sequence[float], at: LineStyle, *, hollow: bool
) -> None:
    """Draw a mean with its interval in a row, and a faint dot per seed next to it."""
    dots = [row + (0.13 if hollow else -0.13)] * len(seeds)
    axes.plot(seeds, dots, "o", color=at.colour, alpha=0.35, markersize=4.5, markeredgewidth=0)
    axes.errorbar(
        [percent.mean],
        [row],
        xerr=[percent.ci95],
        fmt=at.marker,
        color=at.colour,
        markerfacecolor="white" if hollow else at.colour,
        markersize=7,
    )


def legend_handle(label: str, *, hollow: bool = False, seed: bool = False) -> Line2D:
    """Return a legend entry that explains the marks of ``draw_estimate``."""
    return Line2D(
        [],
        [],
        linestyle="none" if seed else "-",
        marker="o",
        color=GREY,
        alpha=0.5 if seed else 1,
        markerfacecolor="white" if hollow else GREY,
        markersize=4.5 if seed else 7,
        markeredgewidth=0 if seed else 1,
        label=label,
    )


@metalearn_style()
def legend_below(figure: Figure, entries: Iterable[Line2D] = ()) -> None:
    """Add a legend below all panels: the entries, or else every labelled line, each label once."""
    found: dict[str, Artist] = {str(entry.get_label()): entry for entry in entries}
    if not found:
        for axes in figure.axes:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                found.setdefault(label, handle)
    longest = max(map(len, found)) + 8  # with the line in front of the label, and a gap
    columns = max(1, min(len(found), _LEGEND_CHARACTERS // longest))
    figure.legend(list(found.values()), list(found), loc="outside lower center", ncols=columns)


def to_percent(estimate: MeanCI) -> MeanCI:
    """Convert fractions to percent."""
    return MeanCI(100 * estimate.mean, 100 * estimate.ci95)
