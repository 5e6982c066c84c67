"""Draw ``outputs/reference/overview.png``, accuracy and memory of both orders: ``python -m docs.blocks.overview``."""

from __future__ import annotations

import hashlib
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from docs.blocks.markdown import REFERENCE, read
from metalearn.lessons.lesson import BLUE, GREEN, VERMILION

PICTURE = REFERENCE / "overview.png"
_MEMORY = "engines/20way_1shot.json"
_FIRST, _SECOND, _CHECKPOINT = VERMILION, BLUE, GREEN
_TASKS = {
    "glyphs-5w1s": "glyphs\n5-way 1-shot",
    "omniglot-5w1s": "Omniglot\n5-way 1-shot",
    "omniglot-20w1s": "Omniglot\n20-way 1-shot",
}
_LINES = {  # engine, second order, task_chunk: label, colour
    ("unroll", True, None): ("second order, unroll, 16 tasks at a time", _SECOND),
    ("checkpoint", True, 4): ("second order, checkpoint, 4 at a time", _CHECKPOINT),
    ("unroll", False, None): ("first order, 16 at a time", _FIRST),
}
_LABELS = {("unroll", True): (1.1, 2250), ("checkpoint", True): (1.1, 57), ("unroll", False): (1.1, 97)}


def draw() -> Figure:
    """Return the figure: accuracies on the left, memory on the right."""
    figure = Figure(figsize=(10, 3.8), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
    _draw_accuracies(left)
    _draw_memory(right)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
    return figure


def _draw_accuracies(axes: Axes) -> None:
    for place, folder in enumerate(_TASKS):
        second, first = read(f"compare/{folder}/results.json")["variants"]
        for shift, variant, label, colour in (
            (-0.18, first, "first order", _FIRST),
            (0.18, second, "second order", _SECOND),
        ):
            mean, half = (100 * variant["accuracy"][name] for name in ("mean", "ci95"))
            axes.errorbar(place + shift, mean, half, fmt="o", color=colour, capsize=4, label=None if place else label)
            axes.text(place + shift + 0.06, mean, f"{mean:.1f}", va="center", fontsize=9)
    axes.set_xticks(range(len(_TASKS)), list(_TASKS.values()))
    axes.set_xlim(-0.5, len(_TASKS) - 0.5)
    axes.set_ylim(60, 100)
    axes.set_ylabel("test accuracy, %")
    axes.set_title("What second order buys", loc="left", fontweight="bold", fontsize=11)
    axes.legend(loc="lower left", frameon=False, fontsize=9)


def _draw_memory(axes: Axes) -> None:
    rows: list[dict[str, Any]] = read(_MEMORY)["settings"]["20way_1shot"]["rows"]
    for (engine, second_order, chunk), (label, colour) in _LINES.items():
        found = [
            (r["steps"], r["peak_mib"])
            for r in rows
            if (r["engine"], r["second_order"], r["task_chunk"]) == (engine, second_order, chunk)
            and r["snapshot_every"] == 1
            and r["peak_mib"]
        ]
        steps, memory = zip(*sorted(found), strict=True)
        axes.plot(steps, memory, "o-", color=colour, markersize=4)
        axes.text(*_LABELS[engine, second_order], label, color=colour, fontsize=9)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
    axes.set_yticks([50, 100, 200, 500, 1000, 2000], ["50", "100", "200", "500", "1,000", "2,000"])
    axes.minorticks_off()
    axes.set_xlabel("inner steps K")
    axes.set_ylabel("peak memory of a meta-gradient, MiB")
    axes.set_title("What it costs: 16 tasks, 20-way 1-shot", loc="left", fontweight="bold", fontsize=11)


def data_digest() -> str:
    """Return the SHA-256 of the files that the figure is drawn from; the picture carries it."""
    names = [*(f"compare/{folder}/results.json" for folder in _TASKS), _MEMORY]
    return hashlib.sha256(b"".join((REFERENCE / name).read_bytes() for name in names)).hexdigest()


if __name__ == "__main__":
    draw().savefig(PICTURE, dpi=110, metadata={"Source": data_digest()})
