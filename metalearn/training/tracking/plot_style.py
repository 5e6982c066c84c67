"""One look for all plots of a comparison: a colour, a marker and a line style for each line, and sparse axes.

The colours are Okabe and Ito's, which colour-blind readers can tell apart; marker and line style do so in grey print.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from metalearn.training.evaluation import MeanCI

GREY = "#666666"
_WIDTH, _MARGIN = 9.0, 0.1  # inches
_LEGEND_CHARACTERS = 100  # that a line of the legend holds

# Without the yellow, which is too faint on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<")  # one more than colours: the ninth line differs from the first
_DASHES = ((), (5, 2), (6, 2, 1, 2), (1, 1.5), (10, 3), (3, 1, 1, 1, 1, 1), (2, 3), (10, 2, 2, 2, 2, 2))


class LineStyle(NamedTuple):
    """How a line is drawn; ``dashes`` are lengths of ink and of gaps in line widths, none for a solid line."""

    colour: str
    marker: str
    dashes: tuple[float, ...]


def line_style(position: int) -> LineStyle:
    """That of the variant at a position."""
    return LineStyle(
        _COLOURS[position % len(_COLOURS)], _MARKERS[position % len(_MARKERS)], _DASHES[position % len(_DASHES)]
    )


NEUTRAL = LineStyle("#444444", "o", ())
"""Of what belongs to no variant alone."""


def escape_mathtext(text: str) -> str:
    """Text that matplotlib does not take for a formula."""
    return text.replace("$", r"\$")


def new_figure(title: str, note: str, *, height: float = 4.8, panels: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure with panels side by side that share the vertical axis' position, not its scale."""
    figure = Figure(figsize=(_WIDTH, height), layout=ConstrainedLayoutEngine(w_pad=_MARGIN, h_pad=_MARGIN))
    figure.suptitle(f"{escape_mathtext(title)}\n{escape_mathtext(note)}", fontsize="large")
    axes = [figure.add_subplot(1, panels, panel + 1) for panel in range(panels)]
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.3)
        panel.set_axisbelow(True)
    return figure, axes


def label_rows(axes: Axes, names: Sequence[str]) -> None:
    """A row for each name, from top to bottom."""
    axes.set_yticks(range(len(names)), [escape_mathtext(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)


def draw_line(axes: Axes, x: Sequence[float], y: Sequence[float], at: LineStyle, name: str, *, marks: int = 1) -> None:
    """A line in its look, with a marker on every ``marks``-th point."""
    (line,) = axes.plot(
        x,
        y,
        color=at.colour,
        marker=at.marker,
        markersize=5,
        markevery=marks,
        linewidth=1.6,
        label=escape_mathtext(name),
    )
    if at.dashes:
        line.set_dashes(at.dashes)


def draw_estimate(
    axes: Axes, row: float, percent: MeanCI, seeds: Sequence[float], at: LineStyle, *, hollow: bool
) -> None:
    """A mean with its interval, and a faint dot per seed beside it."""
    beside = row + (0.13 if hollow else -0.13)
    axes.plot(seeds, [beside] * len(seeds), "o", color=at.colour, alpha=0.35, markersize=4.5, markeredgewidth=0)
    axes.errorbar(
        [percent.mean],
        [row],
        xerr=[percent.ci95],
        fmt=at.marker,
        color=at.colour,
        markerfacecolor="white" if hollow else at.colour,
        markersize=7,
        capsize=3,
    )


def legend_handle(label: str, *, hollow: bool = False, seed: bool = False) -> Line2D:
    """An entry of a legend that explains the marks of ``draw_estimate``."""
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


def legend_below(figure: Figure, entries: Iterable[Line2D] = ()) -> None:
    """A legend below all panels: of the entries, or else of everything that has a label, once."""
    found: dict[str, Artist] = {str(entry.get_label()): entry for entry in entries}
    if not found:
        for axes in figure.axes:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                found.setdefault(label, handle)
    longest = max(map(len, found)) + 8  # the line that stands before the name, and a gap
    figure.legend(
        list(found.values()),
        list(found),
        loc="outside lower center",
        ncols=max(1, min(len(found), _LEGEND_CHARACTERS // longest)),
        frameon=False,
        handlelength=4,
    )


def to_percent(estimate: MeanCI) -> MeanCI:
    """Of a fraction."""
    return MeanCI(100 * estimate.mean, 100 * estimate.ci95)
