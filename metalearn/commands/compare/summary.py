"""What a comparison found, in plain sentences without markup, for the terminal and the report."""

from __future__ import annotations

from metalearn.commands.compare.results import Difference, Results, RunResult, VariantResult


def headline(results: Results) -> list[str]:
    """Who is ahead and by how much, what it costs, and which runs are missing."""
    by_name = {variant.name: variant for variant in results.variants}
    sentences = []
    for each in results.differences:
        sentences.append(_who_is_ahead(each))
        sentences += _cost_of_runs(by_name[each.first], by_name[each.other], alone=results.runs_at_a_time == 1)
    if not results.differences:
        sentences += _without_a_difference(results.variants)
    return [*sentences, *_cost_of_second_order(results), *_missing_in_short(results)]


def _who_is_ahead(each: Difference) -> str:
    mean, ci95 = each.accuracy.mean, each.accuracy.ci95
    if mean == 0 and ci95 == 0:
        return f"{each.first} and {each.other} are equal on every test task."
    leader, trailer = (each.first, each.other) if mean >= 0 else (each.other, each.first)
    by = f"{100 * abs(mean):.2f} ± {100 * ci95:.2f} percentage points of test accuracy"
    over = describe_interval(len(each.seeds)) + ("" if each.paired else "; they are not tested on the same tasks")
    if each.clear:
        return f"{leader} is ahead of {trailer} by {by} (95% interval {over}): the interval excludes zero."
    return f"Between {leader} and {trailer} there is no clear difference, {by} (95% interval {over}): it includes zero."


def describe_interval(seeds: int) -> str:
    """What an interval is taken over."""
    return f"over {seeds} seeds and their tasks" if seeds > 1 else "over test tasks alone, as there is one seed"


def _cost_of_runs(first: VariantResult, other: VariantResult, *, alone: bool) -> list[str]:
    """Times of runs that shared the machine are no headline: it is not known what ran beside each."""
    time = _ratio("the time per meta-step", first.meta_step_ms, other.meta_step_ms, "ms") if alone else []
    memory = _ratio("the peak memory", first.peak_mib, other.peak_mib, "MiB")
    parts = " and ".join(time + memory)
    return [f"In its runs {first.name} takes {parts} of {other.name}."] if parts else []


def _ratio(what: str, own: float | None, its: float | None, unit: str) -> list[str]:
    """Nothing where a figure is missing."""
    return (
        [f"{format_number(own / its)} times {what} ({format_number(own)} against {format_number(its)} {unit})"]
        if own and its
        else []
    )


def _without_a_difference(variants: list[VariantResult]) -> list[str]:
    sentences = [
        f"{variant.name} reaches {variant.accuracy} on test tasks "
        f"(95% interval {describe_interval(len(variant.finished))})."
        for variant in variants
        if variant.accuracy is not None
    ]
    if not sentences:
        return ["No run is finished, so there is nothing to compare yet."]
    if len(variants) > 1:
        sentences.append("No difference can be stated yet: that takes a seed that two variants have finished.")
    return sentences


def _cost_of_second_order(results: Results) -> list[str]:
    """Of ``unroll``, which is the second-order gradient as it is usually computed, over first order."""
    rows = [row for row in results.cost if row.steps == results.inner_steps]
    at = {row.name: row for row in rows}
    if "first order" not in at or "unroll" not in at:
        return []
    first, second = at["first order"], at["unroll"]
    parts = _ratio("the time", second.median_ms, first.median_ms, "ms")
    parts += _ratio("the peak memory", second.peak_mib, first.peak_mib, "MiB")
    if second.peak_mib is None and first.peak_mib:
        limit = results.cost_limit_mib
        ratio = format_number(limit / first.peak_mib)
        parts.append(f"over {ratio} times the peak memory (over {limit:g} against {format_number(first.peak_mib)} MiB)")
    if not parts:
        return []
    start = f"Measured in turns at K = {results.inner_steps}, one second-order meta-gradient (unroll) takes"
    return [f"{start} {' and '.join(parts)} of first order."]


def missing(results: Results, state: str) -> list[tuple[VariantResult, RunResult]]:
    """The runs that are ``failed`` or ``unfinished``, beside their variants."""
    return [(variant, run) for variant in results.variants for run in variant.runs if run.state == state]


def _missing_in_short(results: Results) -> list[str]:
    total = sum(len(variant.runs) for variant in results.variants)
    sentences = []
    for state, words in {"failed": "failed", "unfinished": "not finished"}.items():
        names = [f"{variant.name} seed {run.seed}" for variant, run in missing(results, state)]
        if names:
            verb = "" if state == "failed" else "is " if len(names) == 1 else "are "
            sentences.append(f"{len(names)} of {total} runs {verb}{words}: {', '.join(names)}.")
    return sentences


def format_number(value: float) -> str:
    """With three digits, or all before the point."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f}"


def format_duration(seconds: float) -> str:
    """In the unit that suits its length."""
    if seconds < 120:
        return f"{format_number(seconds)} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
