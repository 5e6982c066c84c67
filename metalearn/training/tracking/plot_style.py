"""Helpers for plots in the style of ``metalearn.mplstyle``: line styles, panels, legends and intervals."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import fill
from typing import Literal, NamedTuple

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

import metalearn
from metalearn.training.evaluation import MeanCI

GREY = "#666666"
_FILE = Path(metalearn.__file__).with_name("metalearn.mplstyle")
_STYLE = matplotlib.rc_params_from_file(_FILE, use_default_template=False)
_COLOURS = _STYLE["axes.prop_cycle"].by_key()["color"]
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<")  # one more than colours: the ninth line differs from the first
_DASHES = ((), (5, 2), (6, 2, 1, 2), (1, 1.5), (10, 3), (3, 1, 1, 1, 1, 1), (2, 3), (10, 2, 2, 2, 2, 2))
_WIDTH = 9.0  # inches
_NARROW, _LEGEND_LINE = 4.6, 0.2  # inches
_NAME, _LABEL = 20, 40  # characters per line of a row's name and of a legend's entry, in a narrow figure
_PANEL_SHARE = 0.75  # of the height that a panel has when it stands beside others
_LEGEND_CHARACTERS = 11  # per inch of a legend


class LineStyle(NamedTuple):
    """Colour, marker and dashes of a line; ``dashes`` are lengths of ink and of gaps in line widths, empty if solid."""

    colour: str
    marker: str
    dashes: tuple[float, ...]


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
    axes: Axes,
    row: float,
    percent: MeanCI,
    seeds: Sequence[float],
    at: LineStyle,
    *,
    lowest: float = 0,
    hollow: bool = False,
) -> None:
    """Draw a mean with its interval, cut at ``lowest`` and 100, in a row, and a faint dot per seed next to it."""
    low, high = percent.ends(lowest, 100)
    dots = [row + (0.13 if hollow else -0.13)] * len(seeds)
    axes.plot(seeds, dots, "o", color=at.colour, alpha=0.5, markersize=4.5, markeredgewidth=0)
    axes.errorbar(
        [percent.mean],
        [row],
        xerr=[[percent.mean - low], [high - percent.mean]],
        fmt=at.marker,
        color=at.colour,
        markerfacecolor="white" if hollow else at.colour,
        markersize=7,
    )


def legend_handle(*, hollow: bool = False, seed: bool = False) -> Line2D:
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
    )


@metalearn_style()
def legend_below(figure: Figure, entries: Mapping[str, Artist] | None = None) -> None:
    """Add a legend below all panels: the entries by label, or else every labelled line, each label once."""
    found: dict[str, Artist] = dict(entries or {})
    if not found:
        for axes in figure.axes:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                found.setdefault(label, handle)
    longest = max(map(len, found)) + 8  # with the line in front of the label, and a gap
    columns = max(1, min(len(found), int(figure.get_figwidth() * _LEGEND_CHARACTERS) // longest))
    figure.legend(list(found.values()), list(found), loc="outside lower center", ncols=columns)


def limit_to_percent(axes: Axes, axis: Literal["x", "y"], lowest: float = 0) -> None:
    """End an axis of accuracies at ``lowest`` and 100, with room for half a marker."""
    low, high = axes.get_xlim() if axis == "x" else axes.get_ylim()
    room = 0.02 * (high - low)
    limits = max(low, lowest - room), min(high, 100 + room)
    axes.set_xlim(limits) if axis == "x" else axes.set_ylim(limits)


@metalearn_style()
def stack_panels(figure: Figure) -> None:
    """Make a figure as narrow as a phone: panels below one another, names of rows and the legend in more lines."""
    panels = figure.axes
    entries = [text for legend in figure.legends for text in legend.get_texts()]
    height = figure.get_figheight() * max(1, _PANEL_SHARE * len(panels)) + _LEGEND_LINE * len(entries)
    figure.set_size_inches(_NARROW, height)
    grid = GridSpec(len(panels), 1, figure=figure)
    for i, panel in enumerate(panels):
        panel.set_subplotspec(grid[i])
        panel.set_ylabel(panel.get_ylabel() or panels[0].get_ylabel())
        panel.tick_params(labelleft=True)
        if isinstance(panel.yaxis.get_major_locator(), FixedLocator):  # names of rows
            names = [label.get_text().replace(",", ", ") for label in panel.get_yticklabels()]
            panel.set_yticks(panel.get_yticks(), [fill(name, _NAME) for name in names])
    for legend in figure.legends:
        handles = zip(legend.get_texts(), legend.legend_handles, strict=True)
        found = {fill(text.get_text(), _LABEL): handle for text, handle in handles if handle is not None}
        legend.remove()
        legend_below(figure, found)


_SVG_COLOURS = {
    "#000000": "currentColor",
    "#ffffff": "var(--paper)",
    "#666666": "var(--faint)",
    "#0072b2": "var(--blue)",
}


def inline_svg(figure: Figure, name: str, label: str, layout: str) -> str:
    """Return a figure as an element of a page: transparent, in the page's font and the colours of its style sheet.

    The page sets ``--paper``, ``--faint`` and ``--blue``. Ids begin with ``name``, so that figures do not share them.
    """
    written = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(written, format="svg", transparent=True, metadata=metadata)
    svg = written.getvalue().partition("<svg")[2]
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\1{name}-", svg)
    for colour, variable in _SVG_COLOURS.items():
        svg = re.sub(rf"(fill|stroke): {colour}", rf"\1: {variable}", svg)
    return f'<svg class="{layout}" role="img" aria-label="{html.escape(label)}"{svg.strip()}'


def to_percent(estimate: MeanCI) -> MeanCI:
    """Convert fractions to percent."""
    return MeanCI(100 * estimate.mean, 100 * estimate.ci95)
