"""The tables of a comparison: a header and rows of plain text, for the terminal and the report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from metalearn.commands.benchmark.settings import EngineCost
from metalearn.commands.compare.results import Results, VariantResult
from metalearn.commands.compare.summary import format_duration, format_number

Table = tuple[list[str], list[list[str]]]
_NONE = "-"


def variant_rows(results: Results) -> Table:
    """Return a row per variant: accuracies, costs, and how many of its runs are finished."""
    header = ["variant", "test accuracy", "non-transductive", "ms per meta-step", "peak MiB", "training time"]
    target = results.target_accuracy
    header += [f"time to {target:.1%}"] if target is not None else []
    rows = []
    for variant in results.variants:
        row = [
            variant.name,
            _format(variant.accuracy, str),
            _format(variant.nontransductive, str),
            _format(variant.meta_step_ms, format_number),
            _format(variant.peak_mib, format_number),
            _format(variant.training_s, format_duration),
        ]
        row += [_time_to_target(variant)] if target is not None else []
        rows.append([*row, f"{len(variant.finished)} of {len(variant.runs)}"])
    return [*header, "finished seeds"], rows


def _time_to_target(variant: VariantResult) -> str:
    reached = variant.time_to
    if reached is None:
        return "not reached" if variant.finished else _NONE
    seeds = f"{reached.seeds} of {len(variant.finished)} seeds"
    return f"{format_duration(reached.training_s)}, {reached.iterations:.0f} steps, {seeds}"


def per_step_rows(results: Results) -> Table:
    """Return a row per variant and a column per inner step."""
    steps = max((len(variant.per_step) for variant in results.variants), default=0)
    rows = [
        [variant.name, *map(str, variant.per_step), *[_NONE] * (steps - len(variant.per_step))]
        for variant in results.variants
        if variant.per_step
    ]
    return ["inner steps", *map(str, range(steps))], rows


def difference_rows(results: Results) -> Table:
    """Return a row per difference, in percentage points."""
    points, accuracy = "difference, percentage points", "test accuracy"
    rows = [
        [
            f"{each.first} minus {each.other}",
            f"{_format_points(each.accuracy.mean)} ± {100 * each.accuracy.ci95:.2f}",
            "yes" if each.is_significant else "no",
            f"{_format_points(each.nontransductive.mean)} ± {100 * each.nontransductive.ci95:.2f}",
            ", ".join(
                f"{seed}: {_format_points(value)}" for seed, value in zip(each.seeds, each.per_seed, strict=True)
            ),
        ]
        for each in results.differences
    ]
    return [points, accuracy, "significant", "non-transductive", f"{accuracy} per seed"], rows


def _format_points(difference: float) -> str:
    """Format as percentage points with a sign; zero has none."""
    rounded = round(100 * difference, 2)
    return f"{rounded:+.2f}" if rounded else "0.00"


def memory_rows(results: Results) -> Table:
    """Return the peak MiB of a meta-gradient: a row per engine, a column per K."""
    over = f"over {results.cost_limit_mib:g}"
    return _cost_rows(results, lambda row: over if row.peak_mib is None else format_number(row.peak_mib))


def time_rows(results: Results) -> Table:
    """Return the milliseconds of a meta-gradient: a row per engine, a column per K."""
    return _cost_rows(results, lambda row: _format(row.median_ms, format_number))


def _cost_rows(results: Results, cell: Callable[[EngineCost], str]) -> Table:
    steps = sorted({row.steps for row in results.cost})
    cells = {(row.name, row.steps): cell(row) for row in results.cost}
    names = dict.fromkeys(row.name for row in results.cost)
    rows = [[name, *(cells.get((name, k), _NONE) for k in steps)] for name in names]
    return ["inner steps K", *map(str, steps)], [row for row in rows if set(row[1:]) != {_NONE}]


def run_rows(results: Results) -> Table:
    """Return a row per run, by its folder, with its own metrics; variant after variant."""
    header = ["run", "seed", "state", "test accuracy", "non-transductive", "ms per meta-step", "peak MiB", "total time"]
    rows = [
        [
            run.folder,
            str(run.seed),
            run.state,
            _format_accuracy(run.metrics, "test.accuracy", "test.ci95"),
            _format_accuracy(run.metrics, "test.accuracy_nontransductive", "test.ci95_nontransductive"),
            _format(run.metrics.get("time.meta_step_ms"), format_number),
            _format(run.metrics.get("memory.peak_mib"), format_number),
            _format(run.metrics.get("time.total_s"), format_duration),
        ]
        for variant in results.variants
        for run in variant.runs
    ]
    return header, rows


def _format_accuracy(metrics: dict[str, Any], mean: str, ci95: str) -> str:
    if metrics.get(mean) is None or metrics.get(ci95) is None:
        return _NONE
    return f"{metrics[mean]:.2%} ± {metrics[ci95]:.2%}"


def _format(value: Any, format_value: Callable[[Any], str]) -> str:
    return _NONE if value is None else format_value(value)
