"""The result of a comparison as sentences and tables of plain text, for the terminal and the report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from metalearn.commands.benchmark.settings import EngineCost, pivot
from metalearn.commands.compare.results import Difference, Results, RunResult, VariantResult
from metalearn.training.evaluation import MeanCI


def headline(results: Results) -> list[str]:
    """Return sentences about which variant is ahead, by how much, at what cost, and which runs are missing."""
    by_name = {variant.name: variant for variant in results.variants}
    sentences = []
    for each in results.differences:
        sentences.append(_describe_difference(each))
        first, other = by_name[each.first], by_name[each.other]
        # Times of runs that shared the machine are no evidence: it is unknown which ran at the same time.
        exclusive = results.runs_at_a_time == 1
        ratios = _ratio("the time per meta-step", first.meta_step_ms, other.meta_step_ms, "ms") if exclusive else []
        ratios += _ratio("the peak memory", first.peak_mib, other.peak_mib, "MiB")
        if ratios:
            sentences.append(f"In the runs, {first.name} took {' and '.join(ratios)} of {other.name}.")
    if not results.differences:
        sentences += _describe_accuracies(results.variants)
    return [*sentences, *_second_order_cost(results), *_describe_missing(results)]


def _describe_difference(each: Difference) -> str:
    mean, ci95 = each.accuracy.mean, each.accuracy.ci95
    if mean == 0 and ci95 == 0:
        return f"{each.first} and {each.other} are equal on every test task."
    leader, trailer = (each.first, each.other) if mean >= 0 else (each.other, each.first)
    points = f"{100 * abs(mean):.2f} ± {100 * ci95:.2f} percentage points of test accuracy"
    over = describe_interval(len(each.seeds)) + ("" if each.paired else "; they were tested on different tasks")
    if each.is_significant:
        return f"{leader} is ahead of {trailer} by {points} (95% interval {over}): the interval excludes zero."
    return (
        f"There is no significant difference between {leader} and {trailer}: {points} (95% interval {over}), which "
        "includes zero."
    )


def describe_interval(seeds: int) -> str:
    """Return a phrase on the variation that an interval over this many seeds covers."""
    return f"over {seeds} seeds and their tasks" if seeds > 1 else "over the test tasks only, as there is one seed"


def _ratio(quantity: str, value: float | None, reference: float | None, unit: str) -> list[str]:
    """Return a ratio as the part of a sentence; nothing where a value is missing."""
    if not value or not reference:
        return []
    values = f"{format_number(value)} against {format_number(reference)} {unit}"
    return [f"{format_number(value / reference)} times {quantity} ({values})"]


def _describe_accuracies(variants: list[VariantResult]) -> list[str]:
    sentences = [
        f"{variant.name} reaches {variant.accuracy} on test tasks "
        f"(95% interval {describe_interval(len(variant.finished))})."
        for variant in variants
        if variant.accuracy is not None
    ]
    if not sentences:
        return ["No run is finished, so there is nothing to compare yet."]
    if len(variants) > 1:
        sentences.append("No difference can be computed yet: two variants must have finished the same seed.")
    return sentences


def _second_order_cost(results: Results) -> list[str]:
    """Compare ``unroll``, the usual way to compute the second-order gradient, with first order."""
    costs = {row.name: row for row in results.cost if row.steps == results.inner_steps}
    if "first order" not in costs or "unroll" not in costs:
        return []
    first, second = costs["first order"], costs["unroll"]
    ratios = _ratio("the time", second.median_ms, first.median_ms, "ms")
    ratios += _ratio("the peak memory", second.peak_mib, first.peak_mib, "MiB")
    if second.peak_mib is None and first.peak_mib:
        limit = results.cost_limit_mib
        values = f"over {limit:g} against {format_number(first.peak_mib)} MiB"
        ratios.append(f"over {format_number(limit / first.peak_mib)} times the peak memory ({values})")
    if not ratios:
        return []
    start = f"Measured in turns at K = {results.inner_steps}, one second-order meta-gradient (unroll) takes"
    return [f"{start} {' and '.join(ratios)} of first order."]


def missing_runs(results: Results, state: str) -> list[tuple[VariantResult, RunResult]]:
    """Return the runs that are ``failed`` or ``unfinished``, each with its variant."""
    return [(variant, run) for variant in results.variants for run in variant.runs if run.state == state]


def _describe_missing(results: Results) -> list[str]:
    total = sum(len(variant.runs) for variant in results.variants)
    sentences = []
    for state in ("failed", "unfinished"):
        names = [f"{variant.name} seed {run.seed}" for variant, run in missing_runs(results, state)]
        verb = "failed" if state == "failed" else "is not finished" if len(names) == 1 else "are not finished"
        if names:
            sentences.append(f"{len(names)} of {total} runs {verb}: {', '.join(names)}.")
    return sentences


def format_number(value: float) -> str:
    """Format with three digits, or all before the point."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f}"


def format_duration(seconds: float) -> str:
    """Format in the unit that suits the length."""
    if seconds < 120:
        return f"{format_number(seconds)} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


Table = tuple[list[str], list[list[str]]]
_NONE = "-"


def variant_rows(results: Results) -> Table:
    """Return a row per variant: accuracies, costs, and how many of its runs are finished."""
    header = ["variant", "test accuracy", "non-transductive", "ms per meta-step", "peak MiB", "training time"]
    target = results.target_accuracy
    header += [f"time to {target:.1%}"] if target is not None else []
    rows = []
    for variant in results.variants:
        accuracies = _format(variant.accuracy, str), _format(variant.nontransductive, str)
        costs = _format(variant.meta_step_ms, format_number), _format(variant.peak_mib, format_number)
        row = [variant.name, *accuracies, *costs, _format(variant.training_s, format_duration)]
        row += [_time_to_target(variant)] if target is not None else []
        rows.append([*row, f"{len(variant.finished)} of {len(variant.runs)}"])
    return [*header, "finished seeds"], rows


def _time_to_target(variant: VariantResult) -> str:
    reached = variant.time_to
    if reached is None:
        return "not reached" if variant.finished else _NONE
    seeds = f"{reached.seeds} of {len(variant.finished)} seeds"
    at_most = "at most " if variant.curve and reached.iterations == variant.curve[0].iteration else ""
    return f"{at_most}{format_duration(reached.training_s)}, {reached.iterations:.0f} steps, {seeds}"


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
            format_points(each.accuracy),
            "yes" if each.is_significant else "no",
            format_points(each.nontransductive),
            ", ".join(f"{s}: {_format_signed(d)}" for s, d in zip(each.seeds, each.per_seed, strict=True)),
        ]
        for each in results.differences
    ]
    return [points, accuracy, "significant", "non-transductive", f"{accuracy} per seed"], rows


def format_points(difference: MeanCI) -> str:
    """Format a difference of accuracies with its interval as percentage points, cut at 100 like an accuracy's."""
    if difference.is_cut(-1, 1):
        low, high = (round(100 * end, 2) for end in difference.ends(-1, 1))
        return f"{_format_signed(difference.mean)} ({low:g} to {high:g})"
    return f"{_format_signed(difference.mean)} ± {100 * difference.ci95:.2f}"


def _format_signed(difference: float) -> str:
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
    by_steps = sorted(results.cost, key=lambda row: row.steps)
    (_, *steps), *rows = pivot({(row.name, row.steps): cell(row) for row in by_steps}, _NONE)
    return ["inner steps K", *steps], [row for row in rows if set(row[1:]) != {_NONE}]


def run_rows(results: Results) -> Table:
    """Return a row per run, by its folder, with its own metrics; variant after variant."""
    header = ["run", "seed", "state", "test accuracy", "non-transductive", "ms per meta-step", "peak MiB", "total time"]
    rows = []
    for run in (run for variant in results.variants for run in variant.runs):
        protocols = [_format_accuracy(run.metrics, suffix) for suffix in ("", "_nontransductive")]
        costs = [_format(run.metrics.get(name), format_number) for name in ("time.meta_step_ms", "memory.peak_mib")]
        total = _format(run.metrics.get("time.total_s"), format_duration)
        rows.append([run.folder, str(run.seed), run.state, *protocols, *costs, total])
    return header, rows


def _format_accuracy(metrics: dict[str, Any], suffix: str) -> str:
    mean, ci95 = (metrics.get(f"test.{name}{suffix}") for name in ("accuracy", "ci95"))
    return _NONE if mean is None or ci95 is None else str(MeanCI(mean, ci95))


def _format(value: Any, format_value: Callable[[Any], str]) -> str:
    return _NONE if value is None else format_value(value)
