"""The file, tables and plots of the benchmarks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from metalearn.commands.benchmark.machine import describe_in_a_line, describe_machine, other_work
from metalearn.commands.benchmark.measure import (
    DATA,
    FORWARD,
    GRADIENT,
    OPTIMISER,
    SECOND_ORDER,
    BenchmarkResult,
    SweepSeries,
)
from metalearn.commands.benchmark.methods import PLAIN, DisagreementError, order_name
from metalearn.commands.benchmark.settings import EngineBenchmark, EngineCost, pivot
from metalearn.config.commands_schema import BenchmarkConfig
from metalearn.core import serialization as files
from metalearn.core.errors import NonFiniteError, RunError
from metalearn.core.profiling.hardware import configure_malloc, set_num_threads
from metalearn.training.experiment import resolve_device
from metalearn.training.tracking.console import print_line, print_path, print_table
from metalearn.training.tracking.plot_style import (
    ENGINE_STYLES,
    GREY,
    draw_line,
    escape_mathtext,
    label_rows,
    line_style,
    new_figure,
    set_log_axes,
)

_HEADER = ("", "ms", "quartiles", "speed", "MiB", "GFLOP/s")
_CHUNK_STYLES = {None: "-", 4: "--", 1: ":"}


class Report:
    """``benchmark.json``, saved after each setting; settings at which methods disagree are reported at the end.

    ``key`` is that of the settings in the file, next to the device's description and ``content``.
    """

    def __init__(self, config: BenchmarkConfig, output_dir: Path, key: str, **content: Any) -> None:
        self.keeps_memory = configure_malloc()
        if config.run.threads != "auto":
            set_num_threads(config.run.threads)
        self.device = resolve_device(config.run.device)
        self.path, self.settings = output_dir / "benchmark.json", dict[str, Any]()
        self.content = {
            "machine": describe_machine(self.device),
            "configure_malloc": self.keeps_memory,
            **content,
            key: self.settings,
        }
        self.failed: dict[str, Exception] = {}

    @contextmanager
    def record(self, name: str, spec: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Save the entry of a setting, which the block fills, or the reason why the setting could not be measured."""
        entry = dict(spec)
        try:
            with other_work() as others:
                yield entry
            entry["other_work"] = others
            print_line(describe_in_a_line(self.content["machine"], others))
        except (DisagreementError, NonFiniteError) as error:
            self.failed[name] = error
            entry["failed"] = str(error)
        self.settings[name] = entry
        files.atomic_write_json(self.path, self.content)

    def close(self) -> None:
        """Print where the report is; raise ``RunError`` with the reasons if settings failed."""
        print_path("Written to", self.path)
        if self.failed:
            count = f"{len(self.failed)} of {len(self.settings)} settings could not be timed; the others are written."
            raise RunError("\n".join([count, *(f"{name}: {error}" for name, error in self.failed.items())]))


def _cells(row: BenchmarkResult) -> list[str]:
    """Return the cells of ``_HEADER``, as many as fit into 80 columns; ``benchmark.json`` has all."""
    ms = [f"{value:.1f}" if value < 1000 else f"{value:.0f}" for value in (row.median_ms, *row.quartiles_ms)]
    peak = "-" if row.peak_mib is None else f"{row.peak_mib:.0f}"
    return [row.label, ms[0], f"{ms[1]}-{ms[2]}", f"{row.speed:.2f}", peak, f"{row.gflops:.1f}"]


def print_results(title: str, rows: Sequence[BenchmarkResult], matrix_product_gflops: float, against: str) -> None:
    """Print a table for each order; ``matrix_product_gflops`` is 100% in the last column."""
    has_plain = any(row.engine == PLAIN for row in rows)
    plain = ". plain: without metalearn.configure_malloc(), which the others have" if has_plain else ""
    for second_order in (True, False):
        cells = [_cells(row) for row in rows if row.second_order == second_order]
        print_table(
            f"{title}: one meta-gradient, {order_name(second_order)}.\nms: median. speed: relative to {against} (>1 is "
            "faster). MiB: peak of live tensors. "
            f"GFLOP/s: of the FLOPs that the gradient needs; torch.mm: {matrix_product_gflops:.0f}{plain}",
            _HEADER,
            cells,
        )


def print_time_breakdown(shares_of: Mapping[str, Mapping[str, float]]) -> None:
    """Print the components' fractions of a meta-step of our ``unroll``, a row for each setting."""
    names = (DATA, FORWARD, GRADIENT, SECOND_ORDER, OPTIMISER)
    print_table(
        "Where the time of a second-order meta-step goes, metalearn unroll, % of the components' sum",
        ["", *(name.replace("-", "-\n") for name in names)],
        [[setting, *(f"{100 * shares[name]:.1f}" for name in names)] for setting, shares in shares_of.items()],
    )


def print_engine_costs(setting: EngineBenchmark, rows: Sequence[EngineCost], limit_mib: float) -> None:
    """Print two tables, engines by K: peak memory, and time divided by that of ``unroll`` on all tasks."""
    memory, time = {}, {}
    for row in rows:
        cell = row.name.replace(", sparse", ",\nsparse"), f"K={row.steps}"
        memory[cell] = "over" if row.peak_mib is None else f"{row.peak_mib:.0f}"
        if row.ratio_to_unroll:
            time[cell] = f"{row.ratio_to_unroll:.2f}"
    title = f"{setting.title}: peak MiB (over: above {limit_mib:g})"
    for heading, cells in ((title, memory), ("Time relative to unroll on all tasks", time)):
        header, *table = pivot(cells)
        print_table(heading, header, table)


def print_slopes(lines_of: Mapping[str, list[SweepSeries]]) -> None:
    """Print a table for each sweep, a row for each method: medians at both ends, and the exponents."""
    for axis, lines in lines_of.items():
        first, last = lines[0].values[0], lines[0].values[-1]
        print_table(
            f"How cost grows with the {axis}, {first} to {last}: p of cost ~ x^p, fitted on a log-log scale",
            ["", "ms", "p of\ntime", "MiB", "p of\nmemory"],
            [
                [
                    line.name,
                    f"{line.median_ms[0]:.0f}-{line.median_ms[-1]:.0f}",
                    f"{line.slope_ms:.2f}",
                    f"{line.peak_mib[0]:.0f}-{line.peak_mib[-1]:.0f}",
                    f"{line.slope_mib:.2f}",
                ]
                for line in lines
            ],
        )


def plot_speed(rows_of: Mapping[str, Sequence[BenchmarkResult]], against: str) -> Figure:
    """Plot bars of speed with whiskers at the quartiles: a panel for each setting, second order above first."""
    most = max(len(rows) for rows in rows_of.values())
    figure, panels = new_figure(
        "How many times faster a meta-gradient is", f"than {against}'s on the same tasks", height=2 + 0.33 * most,
        panels=len(rows_of),
    )  # fmt: skip
    for panel, (title, rows) in zip(panels, rows_of.items(), strict=True):
        libraries = list(dict.fromkeys(row.label for row in rows))
        for position, row in enumerate(rows):
            low, high = row.speed_quartiles
            bars = panel.barh(
                position,
                row.speed,
                xerr=[[max(0.0, row.speed - low)], [max(0.0, high - row.speed)]],
                height=0.6,
                color=line_style(libraries.index(row.label)).colour,
                alpha=1.0 if row.second_order else 0.6,
                error_kw={"linewidth": 0.8, "ecolor": GREY},
            )
            panel.bar_label(bars, fmt=f"{row.speed:.2f}", padding=3, fontsize="small")
        panel.axvline(1, color=GREY, linewidth=0.8)
        first = panel is panels[0]
        label_rows(panel, [f"{row.label}, {order_name(row.second_order)}" if first else "" for row in rows])
        panel.set_title(escape_mathtext(title.replace(" tasks, ", " tasks,\n")), fontsize="small")
        panel.set_xlabel(f"speed, {against} = 1")
        panel.margins(x=0.2)  # space for the numbers at the ends of the bars
    return figure


def plot_sweep(axis: str, lines: Sequence[SweepSeries], title: str, note: str) -> Figure:
    """Plot time and peak memory against the swept field on logarithmic axes, with slopes in the legends."""
    figure, (time, memory) = new_figure(title, note, panels=2)
    for position, line in enumerate(lines):
        at = line_style(position)
        draw_line(time, line.values, line.median_ms, at, f"{line.name}: slope {line.slope_ms:.2f}")
        draw_line(memory, line.values, line.peak_mib, at, f"{line.name}: slope {line.slope_mib:.2f}")
    time.set_ylabel("time of a meta-gradient, ms (median)")
    memory.set_ylabel("peak memory, MiB")
    for panel in (time, memory):
        set_log_axes(panel, axis, lines[0].values)
        panel.legend(fontsize="small", frameon=False)
    return figure


def plot_memory(title: str, rows: Sequence[EngineCost], limit_mib: float) -> Figure:
    """Plot peak memory against the number of inner steps, a line for every engine and chunk size."""
    figure = Figure(figsize=(9.0, 5.0), layout="constrained")
    axes = figure.add_subplot()
    for name in dict.fromkeys(row.name for row in rows):
        points = [row for row in rows if row.name == name and row.peak_mib is not None]
        if not points:
            continue
        first = points[0]
        colour = ENGINE_STYLES[first.engine if first.second_order else "first order"].colour
        axes.plot(
            [row.steps for row in points],
            [row.peak_mib or 0.0 for row in points],
            marker="x" if first.snapshot_every > 1 else "o",
            markersize=5,
            color=colour,
            linestyle=_CHUNK_STYLES.get(first.task_chunk, "-."),
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
