"""Accuracies: published rows, first against second order, the family, sinusoids, and what depends on the queries."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from docs.blocks.markdown import REFERENCE, accuracy, estimate, points, read, table
from metalearn.commands.compare.statistics import seed_ci
from metalearn.commands.reproduce.table import cells, format_interval
from metalearn.core.text import plural

_COMPARISONS = {
    "glyphs-5w1s": "glyphs, 5-way 1-shot",
    "omniglot-5w1s": "Omniglot, 5-way 1-shot",
    "omniglot-20w1s": "Omniglot, 20-way 1-shot",
}
_FAMILY_NAMES = {"first_order": "maml, first order", "backend-learn2learn": "maml, by learn2learn"}


def reproduction() -> str:
    """Return the rows of the published tables that were trained."""

    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["ways"], row["shots"], row["experiment"], row["order"] == "first"

    rows = [
        {
            "task, `experiment_name=`": f"{row['ways']}-way {row['shots']}-shot, `{row['experiment']}`",
            "order": row["order"],
            **cells(row),
            "meta-steps": f"{row['iterations']:,} of {plural(row['tasks_per_step'], 'task')}",
        }
        for row in sorted(read("omniglot.json")["rows"], key=place)
    ]
    measured = [head for head in rows[0] if any(row[head] != "-" for row in rows)]
    return table(measured, ([row[head] for head in measured] for row in rows))


def runs_of_both_orders() -> str:
    """Return single runs of the defaults, in both orders."""
    head = (
        "data",
        "order",
        "test accuracy",
        "non-transductive",
        "peak memory of a meta-step",
        "after 0 / 1 / 2 / 3 steps",
    )
    rows = []
    for folder in ("omniglot-5w1s", "glyphs-5w1s"):
        for order in ("second", "first"):
            metrics = read(f"{folder}/maml-{order}_order-seed0/metrics.json")
            both = accuracy(metrics), accuracy(metrics, "_nontransductive")
            steps = " / ".join(f"{value:.1%}" for value in metrics["test.accuracy_per_step"])
            rows.append((metrics["dataset"], f"{order} order", *both, f"{metrics['memory.peak_mib']:.0f} MiB", steps))
    return table(head, rows)


def dependence_on_queries() -> str:
    """Say how the accuracy of one checkpoint depends on the queries that share a batch."""
    runs = [read(f"omniglot-5w1s/maml-second_order-seed0/queries-{n}.json") for n in (1, 5, 15)]
    one, five, fifteen = (f"{run['test.accuracy']:.1%}" for run in runs)
    lowest, _, highest = sorted(run["test.accuracy_nontransductive"] for run in runs)
    return (
        f"{one} with 1 query per class, {five} with 5 and {fifteen} with 15, while the non-transductive accuracy stays "
        f"at {lowest:.1%} to {highest:.1%}"
    )


def comparisons() -> str:
    """Return what second order gains, each over three seeds and the same tasks."""
    rows = []
    for folder, label in _COMPARISONS.items():
        results = read(f"compare/{folder}/results.json")
        second, first = results["variants"]
        gain = points(results["differences"][0]["accuracy"], 2)
        rows.append((label, results["iterations"], estimate(second["accuracy"]), estimate(first["accuracy"]), gain))
    return table(("task", "meta-steps", "second order", "first order", "difference, points"), rows)


def comparison(folder: str) -> str:
    """Return the table of a comparison's variants."""
    results = read(f"compare/{folder}/results.json")
    target = f"time to {results['target_accuracy']:.0%} in validation"
    head = ("variant", "test accuracy", "non-transductive", "ms per meta-step", "peak MiB", target)
    return table(
        head,
        (
            (
                v["name"].replace("_", " "),
                estimate(v["accuracy"]),
                estimate(v["nontransductive"]),
                f"{v['meta_step_ms']:.0f}",
                f"{v['peak_mib']:.0f}",
                "{training_s:.0f} s ({iterations:.0f} meta-steps)".format(**v["time_to"]),
            )
            for v in results["variants"]
        ),
    )


def gain_and_cost(folder: str) -> str:
    """Say what second order gains in a comparison, and what one of its meta-gradients costs."""
    results = read(f"compare/{folder}/results.json")
    at = {(r["engine"], r["second_order"]): r for r in results["cost"] if r["steps"] == results["inner_steps"]}
    time, memory = (at["unroll", True][name] / at["unroll", False][name] for name in ("median_ms", "peak_mib"))
    gain = points(results["differences"][0]["accuracy"], 1)
    return (
        f"Second order is {gain} points ahead. One of its meta-gradients takes "
        f"{time:.2f} times as long as first order's and {memory:.2f} times the memory (`unroll`, "
        f"K = {results['inner_steps']})"
    )


def logging_share() -> str:
    """Say what logging takes."""
    logged = read("compare/logging.json")
    share, size = logged["share"]["all"], logged["event_bytes"] / 1e6
    return f"Logging took {share:.1%} of the training time of the glyphs' comparison, and its event files {size:.1f} MB"


def family() -> str:
    """Return the comparison of all algorithms."""
    rows = []
    for v in read("compare/algorithms/results.json")["variants"]:
        words = v["name"].removeprefix("algorithm-").split(",")
        name = _FAMILY_NAMES.get(words[-1], words[0])
        cost = f"{v['meta_step_ms']:.0f}", f"{v['peak_mib']:.0f}"
        rows.append((name, estimate(v["accuracy"]), estimate(v["nontransductive"]), len(v["per_step"]) - 1, *cost))
    head = ("algorithm", "test accuracy", "non-transductive", "inner steps", "ms per meta-step", "peak MiB")
    return table(head, rows)


def measured_accuracy(algorithm: str) -> str:
    """Say how accurate an algorithm was in the comparison of all, and in the published rows; "" if not measured."""
    found = [
        f"{estimate(v['accuracy'])} in the [comparison of all algorithms](results.md#algorithms)"
        for v in read("compare/algorithms/results.json")["variants"]
        if v["name"] == f"algorithm-{algorithm}"
    ]
    found += [
        "{} at {ways}-way {shots}-shot with `experiment={experiment}`".format(format_interval(row["accuracy"]), **row)
        for row in read("omniglot.json")["rows"]
        if row["algorithm"] == algorithm and row["order"] == "second"
    ]
    return f"Measured on Omniglot: {'; '.join(found)}." if found else ""


def sinusoids() -> str:
    """Return the regression of Finn et al., by the number of points."""
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in sorted((REFERENCE / "sinusoid").glob("*.json")):
        metrics = read(f"sinusoid/{path.name}")
        runs[metrics["task"].partition("-")[0]].append(metrics)
    rows = []
    for shots in sorted(runs, key=int, reverse=True):
        errors = (
            seed_ci(*([m[f"test.{name}_per_step"][k] for m in runs[shots]] for name in ("mse", "ci95")))
            for k in (0, 1, 10)
        )
        rows.append((shots, *(f"{e.mean:.2f} ± {e.ci95:.2f}" for e in errors), len(runs[shots])))
    return table(("points", "before", "after 1 step", "after 10 steps", "seeds"), rows)


def measured_on(file: str) -> str:
    """Say on what a file of ``outputs/reference/`` was measured."""
    about = read(file)["machine"]
    return (
        f"{about['cpu']}, {plural(int(about['threads']), 'thread')}, torch {about['torch']}, Python {about['python']}"
    )
