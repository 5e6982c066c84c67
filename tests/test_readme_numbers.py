"""The numbers and tables of the README are the committed ones of ``outputs/reference/``."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import pytest

from metalearn.commands.compare.statistics import seed_ci
from tests.paths import REPO

REFERENCE = REPO / "outputs" / "reference"
README = (REPO / "README.md").read_text()
ON_ONE_LINE = " ".join(README.split())


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((REFERENCE / name).read_text())
    return content


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def estimate(value: dict[str, float]) -> str:
    return f"{value['mean']:.2%} ± {value['ci95']:.2%}"


def points(value: dict[str, float], digits: int) -> str:
    return f"{100 * value['mean']:.{digits}f} ± {100 * value['ci95']:.{digits}f}"


def accuracy(metrics: dict[str, Any], kind: str = "") -> str:
    return f"{metrics[f'test.accuracy{kind}']:.2%} ± {metrics[f'test.ci95{kind}']:.2%}"


@pytest.mark.parametrize("folder", ["omniglot-5w1s", "glyphs-5w1s"])
@pytest.mark.parametrize("order", ["second", "first"])
def test_results(folder: str, order: str) -> None:
    metrics = read(f"{folder}/maml-{order}_order-seed0/metrics.json")
    per_step = " / ".join(f"{value:.1%}" for value in metrics["test.accuracy_per_step"])
    both = accuracy(metrics), accuracy(metrics, "_nontransductive")
    cells = metrics["dataset"], f"{order} order", *both, f"{metrics['memory.peak_mib']:.0f} MiB", per_step
    assert row(*cells) in README


def test_summary() -> None:
    metrics = read("omniglot-5w1s/maml-second_order-seed0/metrics.json")
    minutes = f"{metrics['time.total_s'] / 60:.1f}"
    for text in (
        f"{accuracy(metrics)} (95% CI, 600 tasks, 3 inner steps)",
        f"{metrics['validation.best_accuracy']:.2%} at meta-step {metrics['validation.best_iteration']}",
        f"7000, {metrics['time.meta_step_ms']:.0f} ms each (median)",
        f"{metrics['memory.peak_mib']:.1f} MiB",
        f"{minutes} min ",
        f"{minutes} minutes on Omniglot",
    ):
        assert text in README


def test_dependence_on_the_queries() -> None:
    runs = [read(f"omniglot-5w1s/maml-second_order-seed0/queries-{n}.json") for n in (1, 5, 15)]
    one, five, fifteen = (f"{run['test.accuracy']:.1%}" for run in runs)
    lowest, _, highest = sorted(run["test.accuracy_nontransductive"] for run in runs)
    assert f"{one} with 1 query per class, {five} with 5 and {fifteen} with 15" in ON_ONE_LINE
    assert f"stays at {lowest:.1%} to {highest:.1%}" in ON_ONE_LINE


SPEEDS = {
    "5way_1shot": "5-way 1-shot, 1 query, T = 32, K = 1",
    "20way_1shot": "20-way 1-shot, 1 query, T = 16, K = 5",
    "5way_1shot_15queries": "5-way 1-shot, 15 queries, T = 16, K = 5",
    "5way_1shot_narrow": "5-way 1-shot, T = 32, K = 1, 16 filters",
    "5way_5shot_max_pool": "5-way 5-shot, 15 queries, T = 4, K = 5, max-pooling",
    "5way_1shot_mlp": "5-way 1-shot, T = 32, K = 1, MLP",
    "5way_1shot_resnet12": "5-way 1-shot, 84 x 84, T = 2, K = 1, ResNet-12 of 16 filters",
}
OTHERS = ("hand-written loop", "torch.func", "higher", "TorchOpt", "JAX")


def speed_row(setting: str, second_order: bool) -> str:
    rows = [r for r in read("benchmark/peers.json")["settings"][setting]["rows"] if r["second_order"] == second_order]
    of = {(r["library"], r["engine"] or ""): r for r in rows}
    methods = [("metalearn", engine) for engine in ("unroll, plain", "checkpoint", "adjoint")]
    methods += [(library, "") for library in OTHERS]
    ours = of["metalearn", "unroll"]
    return row(
        SPEEDS[setting],
        "second" if second_order else "first",
        "{:.0f} ({:.0f} to {:.0f})".format(ours["median_ms"], *ours["quartiles_ms"]),
        f"**{ours['speed']:.2f}**",
        *(f"{of[method]['speed']:.2f}" if method in of else "-" for method in methods),
        f"{ours['gflops']:.0f}, {ours['percent_of_peak']:.0f}%",
    )


@pytest.mark.parametrize("setting", SPEEDS)
@pytest.mark.parametrize("second_order", [True, False])
def test_speeds(setting: str, second_order: bool) -> None:
    assert speed_row(setting, second_order) in README


def test_beside_other_work() -> None:
    measured = read("benchmark/busy.json")
    calls, training = measured["call_ms"], measured["training_ms"]
    jax = calls["JAX, in turns with the others"]
    spans = [f"{min(ms):,} to {max(ms):,}" for ms in (*list(calls.values())[:3], jax)]
    assert "{} ms without either, {} with the shorter wait, {} on one thread, JAX {}".format(*spans) in ON_ONE_LINE
    alone = f"{min(training['alone'])} to {max(training['alone'])}"
    assert f"took {training['beside'][0]} ms, alone {alone}" in ON_ONE_LINE


# Label in the README's tables; engine, second order, task_chunk, whether checkpoints are sparse.
ENGINES: dict[str, tuple[str, bool, int | None, bool]] = {
    "first order, all {} tasks": ("unroll", False, None, False),
    "`unroll`, all {} tasks": ("unroll", True, None, False),
    "`checkpoint`, all {} tasks": ("checkpoint", True, None, False),
    "`adjoint`, all {} tasks": ("adjoint", True, None, False),
    "`checkpoint`, `task_chunk=4`": ("checkpoint", True, 4, False),
    "**`adjoint`, `task_chunk=4`**": ("adjoint", True, 4, False),
    "`adjoint`, `task_chunk=4`, sparse checkpoints": ("adjoint", True, 4, True),
    "first order, one task at a time": ("unroll", False, 1, False),
    "`unroll`, one task at a time": ("unroll", True, 1, False),
    "`checkpoint`, one task at a time": ("checkpoint", True, 1, False),
    "`adjoint`, one task at a time": ("adjoint", True, 1, False),
    "`adjoint`, one task at a time, sparse checkpoints": ("adjoint", True, 1, True),
}


def engine_rows(setting: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    name = setting if setting == "20way_1shot" else "benchmark"  # the first was measured once more, alone
    rows = read(f"engines/{name}.json")["settings"][setting]["rows"]
    return {(r["engine"], r["second_order"], r["task_chunk"], r["snapshot_every"] > 1, r["steps"]): r for r in rows}


def mib(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    return "over 4096" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"


@pytest.mark.parametrize(
    ("setting", "tasks", "steps"), [("20way_1shot", 16, (1, 5, 10, 20, 50)), ("20way_1shot_wide", 4, (1, 10, 50))]
)
def test_memory_of_engines(setting: str, tasks: int, steps: tuple[int, ...]) -> None:
    rows = engine_rows(setting)
    measured = {label: key for label, key in ENGINES.items() if any((*key, k) in rows for k in steps)}
    assert len(measured) >= 9
    for label, key in measured.items():
        ratio = rows.get((*key, 10), {}).get("ratio_to_unroll")
        cells = label.format(tasks), *(mib(rows.get((*key, k))) for k in steps), f"{ratio:.2f}" if ratio else "-"
        assert row(*cells) in README


@pytest.mark.parametrize("setting", ["5way_1shot", "5way_5shot"])
def test_memory_with_more_queries(setting: str) -> None:
    rows = engine_rows(setting)
    keys = [*list(ENGINES.values())[:4], ("adjoint", True, 4, False)]
    cells = (f"{mib(rows.get((*key, 1)))} / {mib(rows.get((*key, 10)))}" for key in keys)
    assert row(f"5-way {setting[5]}-shot, 15 queries", *cells) in README


def test_exact_second_order_fits_into_first_order_memory() -> None:
    # The headline: less than first order on the same 16 tasks, and beyond the checkpoints no growth with K.
    rows = engine_rows("20way_1shot")
    first = rows["unroll", False, None, False, 10]["peak_mib"]
    at_one, at_ten = (rows["adjoint", True, 4, False, k] for k in (1, 10))
    nine_checkpoints = 9 * 4 * 113_236 * 4 / 2**20  # nine more of four tasks' 113,236 weights in float32
    assert at_ten["peak_mib"] < first
    assert at_ten["peak_mib"] - nine_checkpoints < 1.05 * at_one["peak_mib"]
    assert at_ten["ratio_to_unroll"] < 1.4
    assert rows["adjoint", True, 4, True, 50]["peak_mib"] < rows["unroll", False, None, False, 1]["peak_mib"]


def test_verification() -> None:
    report = read("verify-float64.json")
    errors: dict[bool, list[float]] = defaultdict(list)
    for comparison in report["comparisons"]:
        errors[comparison["reference"] == "differences"].append(comparison["error"])
    assert report["right"]
    assert f"{len(report['comparisons'])} comparisons in {report['seconds']:.0f} seconds" in ON_ONE_LINE
    assert f"{max(errors[False]):.0e} against engines, libraries and the adapted weights" in ON_ONE_LINE
    assert f"{max(errors[True]):.0e} against differences" in ON_ONE_LINE


def test_lessons() -> None:
    lessons = read("lessons/lessons.json")["lessons"]
    assert all(lesson["right"] for lesson in lessons)
    assert f"All take {sum(lesson['seconds'] for lesson in lessons):.0f} seconds here" in ON_ONE_LINE
    assert f"{sum(len(lesson['checks']) for lesson in lessons)} numbers" in ON_ONE_LINE
    for lesson in lessons:
        assert f"| `{lesson['name']}` |" in README


@pytest.mark.parametrize(
    ("folder", "label"),
    [
        ("glyphs-5w1s", "glyphs, 5-way 1-shot"),
        ("omniglot-5w1s", "Omniglot, 5-way 1-shot"),
        ("omniglot-20w1s", "Omniglot, 20-way 1-shot"),
    ],
)
def test_comparisons(folder: str, label: str) -> None:
    results = read(f"compare/{folder}/results.json")
    second, first = results["variants"]
    (difference,) = results["differences"]
    assert (second["name"], first["name"], results["complete"]) == ("second_order", "first_order", True)
    assert results["seeds"] == difference["seeds"] == [0, 1, 2]
    gain = difference["accuracy"]
    assert gain["mean"] > gain["ci95"], "second order is ahead beyond its interval"
    cells = results["iterations"], estimate(second["accuracy"]), estimate(first["accuracy"]), points(gain, 2)
    assert row(label, *cells) in README


def cost_of_second_order(results: dict[str, Any]) -> str:
    at = {(r["engine"], r["second_order"]): r for r in results["cost"] if r["steps"] == results["inner_steps"]}
    time, memory = (at["unroll", True][name] / at["unroll", False][name] for name in ("median_ms", "peak_mib"))
    return f"takes {time:.2f} times as long as first order's and {memory:.2f} times the memory"


def test_comparison_of_glyphs() -> None:
    results = read("compare/glyphs-5w1s/results.json")
    for variant in results["variants"]:
        cells = (
            variant["name"].replace("_", " "),
            estimate(variant["accuracy"]),
            estimate(variant["nontransductive"]),
            f"{variant['meta_step_ms']:.0f}",
            f"{variant['peak_mib']:.0f}",
            "{training_s:.0f} s ({iterations:.0f} meta-steps)".format(**variant["time_to"]),
        )
        assert row(*cells) in README
    assert cost_of_second_order(results) in ON_ONE_LINE
    assert f"Second order is {points(results['differences'][0]['accuracy'], 1)} points ahead" in ON_ONE_LINE
    assert f"time to {results['target_accuracy']:.0%} in validation" in README


def test_cost_at_20_ways_and_of_logging() -> None:
    assert f"{cost_of_second_order(read('compare/omniglot-20w1s/results.json'))} by `unroll`" in ON_ONE_LINE
    logging = read("compare/logging.json")
    assert f"Logging took {logging['share']['all']:.1%} of the training time" in ON_ONE_LINE
    assert f"its event files {logging['event_bytes'] / 1e6:.1f} MB" in ON_ONE_LINE
    runs = [r["metrics"] for v in read("compare/glyphs-5w1s/results.json")["variants"] for r in v["runs"]]
    share = sum(m["time.logging_s"] for m in runs) / sum(m["time.training_s"] for m in runs)
    assert logging["share"]["all"] == pytest.approx(share, abs=1e-4)
    assert share < 0.03


def test_table_of_the_family() -> None:
    variants = read("compare/algorithms/results.json")["variants"]
    lines = [row("algorithm", "test accuracy", "non-transductive", "inner steps", "ms per meta-step", "peak MiB")]
    lines.append("|---" * 6 + "|")
    names = {"first_order": "maml, first order", "backend-learn2learn": "maml, by learn2learn"}
    for v in variants:
        words = v["name"].removeprefix("algorithm-").split(",")
        cells = len(v["per_step"]) - 1, f"{v['meta_step_ms']:.0f}", f"{v['peak_mib']:.0f}"
        name = names.get(words[-1], words[0])
        lines.append(row(name, estimate(v["accuracy"]), estimate(v["nontransductive"]), *cells))
    assert "\n".join(lines) + "\n" in README
    found = {v["name"].removeprefix("algorithm-"): v["accuracy"]["mean"] for v in variants}
    assert min(found.values()) > 0.4, "chance is 0.2"
    assert found["maml_pp"] >= found["maml"]


def test_table_of_sinusoids() -> None:
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in sorted((REFERENCE / "sinusoid").glob("*.json")):
        metrics = read(f"sinusoid/{path.name}")
        runs[metrics["task"].partition("-")[0]].append(metrics)
    lines = [row("points", "before", "after 1 step", "after 10 steps", "seeds"), "|---" * 5 + "|"]
    for shots in sorted(runs, key=int, reverse=True):
        errors = (
            seed_ci(*([m[f"test.{name}_per_step"][k] for m in runs[shots]] for name in ("mse", "ci95")))
            for k in (0, 1, 10)
        )
        lines.append(row(shots, *(f"{e.mean:.2f} ± {e.ci95:.2f}" for e in errors), len(runs[shots])))
    assert "\n".join(lines) + "\n" in README
    for metrics in runs["10"]:
        after_one, after_ten = (metrics["test.mse_per_step"][k] for k in (1, 10))
        assert after_one < 0.8, "well under 1 after one step, as in the paper"
        assert after_ten < after_one
