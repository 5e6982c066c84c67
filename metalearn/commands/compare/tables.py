"""The tables of a comparison: a header and rows of plain text, for the terminal and the report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from metalearn.commands.benchmark.engine_settings import EngineCost
from metalearn.commands.compare.results import Results, TimeToAccuracy, VariantResult
from metalearn.commands.compare.summary import format_duration, format_number

Table = tuple[list[str], list[list[str]]]
_NONE = "-"


def variant_rows(results: Results) -> Table:
    """A row a variant: accuracies, costs, and how many of its runs are finished."""
    header = ["variant", "test accuracy", "non-transductive", "ms per meta-step", "peak MiB", "training time"]
    target = results.target_accuracy
    header += [f"time to {target:.1%}"] if target is not None else []
    rows = []
    for variant in results.variants:
        row = [
            variant.name,
            _text(variant.accuracy, str),
            _text(variant.nontransductive, str),
            _text(variant.meta_step_ms, format_number),
            _text(variant.peak_mib, format_number),
            _text(variant.training_s, format_duration),
        ]
        row += [_time_to(variant)] if target is not None else []
        rows.append([*row, f"{len(variant.finished)} of {len(variant.runs)}"])
    return [*header, "finished seeds"], rows


def _time_to(variant: VariantResult) -> str:
    found: TimeToAccuracy | None = variant.time_to
    if found is None:
        return "not reached" if variant.finished else _NONE
    reached = f"{found.seeds} of {len(variant.finished)} seeds"
    return f"{format_duration(found.training_s)}, {found.iterations:.0f} steps, {reached}"


def per_step_rows(results: Results) -> Table:
    """A row a variant, a column an inner step."""
    steps = max((len(variant.per_step) for variant in results.variants), default=0)
    rows = [
        [variant.name, *map(str, variant.per_step), *[_NONE] * (steps - len(variant.per_step))]
        for variant in results.variants
        if variant.per_step
    ]
    return ["inner steps", *map(str, range(steps))], rows


def difference_rows(results: Results) -> Table:
    """A row a difference, in percentage points."""
    header = ["difference, percentage points", "test accuracy", "clear", "non-transductive", "test accuracy per seed"]
    rows = [
        [
            f"{each.first} minus {each.other}",
            f"{_points(each.accuracy.mean)} ± {100 * each.accuracy.ci95:.2f}",
            "yes" if each.clear else "no",
            f"{_points(each.nontransductive.mean)} ± {100 * each.nontransductive.ci95:.2f}",
            ", ".join(f"{seed}: {_points(value)}" for seed, value in zip(each.seeds, each.per_seed, strict=True)),
        ]
        for each in results.differences
    ]
    return header, rows


def _points(difference: float) -> str:
    """Percentage points with a sign; zero has none."""
    rounded = round(100 * difference, 2)
    return f"{rounded:+.2f}" if rounded else "0.00"


def memory_rows(results: Results) -> Table:
    """Peak MiB of a meta-gradient: engines down, K across."""
    return _cost_rows(
        results, lambda row: f"over {results.cost_limit_mib:g}" if row.peak_mib is None else format_number(row.peak_mib)
    )


def time_rows(results: Results) -> Table:
    """Milliseconds of a meta-gradient: engines down, K across."""
    return _cost_rows(results, lambda row: _text(row.median_ms, format_number))


def _cost_rows(results: Results, cell: Callable[[EngineCost], str]) -> Table:
    steps = sorted({row.steps for row in results.cost})
    at = {(row.name, row.steps): cell(row) for row in results.cost}
    names = dict.fromkeys(row.name for row in results.cost)
    rows = [[name, *(at.get((name, k), _NONE) for k in steps)] for name in names]
    return ["inner steps K", *map(str, steps)], [row for row in rows if set(row[1:]) != {_NONE}]


def run_rows(results: Results) -> Table:
    """A row a run, by its folder, with the figures of its own; variant after variant."""
    header = ["run", "seed", "state", "test accuracy", "non-transductive", "ms per meta-step", "peak MiB", "total time"]
    rows = [
        [
            run.folder,
            str(run.seed),
            run.state,
            _accuracy(run.metrics, "test.accuracy", "test.ci95"),
            _accuracy(run.metrics, "test.accuracy_nontransductive", "test.ci95_nontransductive"),
            _text(run.metrics.get("time.meta_step_ms"), format_number),
            _text(run.metrics.get("memory.peak_mib"), format_number),
            _text(run.metrics.get("time.total_s"), format_duration),
        ]
        for variant in results.variants
        for run in variant.runs
    ]
    return header, rows


def _accuracy(metrics: dict[str, Any], mean: str, ci95: str) -> str:
    if metrics.get(mean) is None or metrics.get(ci95) is None:
        return _NONE
    return f"{metrics[mean]:.2%} ± {metrics[ci95]:.2%}"


def _text(value: Any, write: Callable[[Any], str]) -> str:
    return _NONE if value is None else write(value)
