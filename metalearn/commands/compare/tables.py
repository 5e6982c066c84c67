"""The result of a comparison as sentences and tables of plain text, for the terminal and the report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from metalearn.commands.benchmark.settings import EngineCost, pivot
from metalearn.commands.compare.results import Difference, Results, RunResult, VariantResult
from metalearn.core.text import format_duration, format_number
from metalearn.training.evaluation import MeanCI


def headline(results: Results) -> list[str]:
    """Return one sentence about which variant is ahead and at what cost, and sentences about missing runs."""
    if len(results.differences) == 1:
        sentences = [
            _describe_difference(results, each) + _describe_costs(results, each) + "." for each in results.differences
        ]
    elif results.differences:
        sentences = [_describe_best(results)]
    else:
        sentences = _describe_accuracies(results.variants)
    return [*sentences, *_describe_missing(results)]


def _describe_difference(results: Results, each: Difference) -> str:
    if each.accuracy.mean == each.accuracy.ci95 == 0:
        return f"{each.first} and {each.other} are equal on every test task"
    over = describe_interval(len(each.seeds)) + ("" if each.paired else "; they were tested on different tasks")
    points, interval = "percentage points of test accuracy", f"(95% interval {over})"
    if not each.is_significant:
        return (
            f"There is no clear difference between {each.first} and {each.other}: {format_points(each.accuracy)} "
            f"{points} {interval}, which includes zero"
        )
    names = (each.first, each.other) if each.accuracy.mean > 0 else (each.other, each.first)
    ahead = format_points(MeanCI(abs(each.accuracy.mean), each.accuracy.ci95)).removeprefix("+")
    if results.orders and names[0] == results.orders[0].name:
        return f"Second order buys {ahead} {points} over first order {interval}"
    return f"{names[0]} is ahead of {names[1]} by {ahead} {points} {interval}"


def _describe_costs(results: Results, each: Difference) -> str:
    """Return the cost of second order, or else of the variant that is named first, as the end of a sentence."""
    costs, names = step_costs(results), [variant.name for variant in results.variants]
    of, to = [v.name for v in results.orders] if results.orders else (each.first, each.other)
    a, b = names.index(of), names.index(to)
    ratios = [] if costs.is_rough else _ratio("the time", costs.ms[a], costs.ms[b], "ms")
    ratios += _ratio("the peak memory", costs.mib[a], costs.mib[b], "MiB")
    shown = ("second order", "first order") if results.orders else (of, to)
    return f"; a {costs.step} of {shown[0]} costs {' and '.join(ratios)} of {shown[1]}" if ratios else ""


class StepCosts(NamedTuple):
    """Time and memory of a step of each variant; ``is_rough`` if other runs slowed it down."""

    step: str
    ms: list[float | None]
    mib: list[float | None]
    is_rough: bool


def step_costs(results: Results) -> StepCosts:
    """Return the costs of the two orders as measured in turns, if they were, else of the variants' runs."""
    if results.orders:
        second, _ = results.orders
        engine = next((run.metrics["engine"] for run in second.finished if "engine" in run.metrics), "unroll")
        rows = {row.name: row for row in results.cost if row.steps == results.inner_steps}
        found = [rows.get(engine if variant is second else "first order") for variant in results.variants]
        measured = [row for row in found if row and row.median_ms is not None and row.peak_mib is not None]
        if len(measured) == len(found):
            return StepCosts("meta-gradient", [r.median_ms for r in measured], [r.peak_mib for r in measured], False)
    ms, mib = [v.meta_step_ms for v in results.variants], [v.peak_mib for v in results.variants]
    return StepCosts("meta-step", ms, mib, results.runs_at_a_time > 1)


def _describe_best(results: Results) -> str:
    """Name the highest accuracy among several variants, and count the differences from the first."""
    measured = [(v.accuracy.mean, v) for v in results.variants if v.accuracy]
    best = max(measured, key=lambda pair: pair[0])[1]
    clear = [each.accuracy.mean > 0 for each in results.differences if each.is_significant]
    ahead, behind, rest = clear.count(False), clear.count(True), len(results.differences) - len(clear)
    return (
        f"{best.name} has the highest test accuracy of {len(measured)} variants, {best.accuracy}; against "
        f"{results.variants[0].name}, the first, {ahead or 'none'} of the others {'are' if ahead > 1 else 'is'} "
        f"clearly ahead, {behind or 'none'} clearly behind, and {rest or 'none'} without a clear difference (95% "
        "intervals)."
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
    total = len(variant.finished)
    seeds = "" if reached.seeds == total else f" in {reached.seeds} of {total} seeds"
    at_most = "at most " if variant.curve and reached.iterations == variant.curve[0].iteration else ""
    return f"{at_most}{format_duration(reached.training_s)}{seeds}, {reached.iterations:.0f} steps"


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
