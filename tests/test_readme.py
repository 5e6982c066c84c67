"""The README says what is true: its code runs, its defaults are the defaults, its figures are the committed ones."""

from __future__ import annotations

import json
import re
import shlex
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from metalearn.config.compose import compose
from tests.conftest import REPO
from tests.faults.rows import ROWS

README = (REPO / "README.md").read_text()
SETTINGS = README.split("## Settings", 1)[1].split("\n## ", 1)[0]
REFERENCE = REPO / "outputs" / "reference"


def test_code_in_your_own_code_runs() -> None:
    code = README.split("## In your own code", 1)[1].split("```python\n", 1)[1].split("```", 1)[0]
    names: dict[str, object] = {}
    exec(code, names)
    assert names["fast"]["0.weight"].shape == (16, 32, 10)  # type: ignore[index]


def test_defaults_in_the_table_are_the_defaults() -> None:
    config = OmegaConf.to_container(compose("train"), resolve=False)
    rows = re.findall(r"^\| ((?:`[\w.]+` ?)+)\| ([^|]+) \|", SETTINGS, flags=re.MULTILINE)
    assert len(rows) > 10
    for names, defaults in rows:
        keys = re.findall(r"`([\w.]+)`", names)
        values = [value.strip().strip("`") for value in defaults.split(",")]
        for key, shown in zip(keys, values, strict=True):
            section, name = key.split(".")
            value = config[section][name]  # type: ignore[index]
            as_yaml = (
                {None: "null", True: "true", False: "false"}.get(value)
                if isinstance(value, (bool, type(None)))
                else f"{value:g}"
                if isinstance(value, float)
                else str(value)
            )
            assert shown == as_yaml, key


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((REFERENCE / name).read_text())
    return content


@pytest.mark.parametrize("folder", ["omniglot-5w1s", "glyphs-5w1s"])
@pytest.mark.parametrize("order", ["second", "first"])
def test_results_are_the_committed_ones(folder: str, order: str) -> None:
    metrics = read(f"{folder}/maml-{order}_order-seed0/metrics.json")
    accuracy = f"{metrics['test.accuracy']:.2%} ± {metrics['test.ci95']:.2%}"
    alone = f"{metrics['test.accuracy_nontransductive']:.2%} ± {metrics['test.ci95_nontransductive']:.2%}"
    per_step = " / ".join(f"{accuracy:.1%}" for accuracy in metrics["test.accuracy_per_step"])
    cells = [metrics["dataset"], f"{order} order", accuracy, alone, f"{metrics['memory.peak_mib']:.0f} MiB", per_step]
    assert f"| {' | '.join(cells)} |" in README


def test_summary_is_the_committed_runs() -> None:
    metrics = read("omniglot-5w1s/maml-second_order-seed0/metrics.json")
    minutes = f"{metrics['time.total_s'] / 60:.1f}"
    assert f"{metrics['test.accuracy']:.2%} ± {metrics['test.ci95']:.2%} (95% CI, 600 tasks, 3 inner steps)" in README
    assert f"{metrics['validation.best_accuracy']:.2%} at meta-step {metrics['validation.best_iteration']}" in README
    assert f"7000, {metrics['time.meta_step_ms']:.0f} ms each (median)" in README
    assert f"{metrics['memory.peak_mib']:.1f} MiB" in README
    assert f"{minutes} min " in README
    assert f"{minutes} minutes on Omniglot" in README


def test_dependence_on_the_queries_is_the_committed_one() -> None:
    runs = {n: read(f"omniglot-5w1s/maml-second_order-seed0/queries-{n}.json") for n in (1, 5, 15)}
    transductive = [f"{runs[n]['test.accuracy']:.1%}" for n in (1, 5, 15)]
    alone = sorted(run["test.accuracy_nontransductive"] for run in runs.values())
    text = " ".join(README.split())
    assert "{} with 1 query per class, {} with 5 and {} with 15".format(*transductive) in text
    assert f"stays at {alone[0]:.1%} to {alone[-1]:.1%}" in text


SPEED_SETTINGS = {
    "5way_1shot": "5-way 1-shot, 1 query, T = 32, K = 1",
    "20way_1shot": "20-way 1-shot, 1 query, T = 16, K = 5",
    "5way_1shot_15queries": "5-way 1-shot, 15 queries, T = 16, K = 5",
}


@pytest.mark.parametrize("setting", SPEED_SETTINGS)
@pytest.mark.parametrize("second_order", [True, False])
def test_speeds_are_the_committed_ones(setting: str, second_order: bool) -> None:
    rows = [r for r in read("benchmark/peers.json")["settings"][setting]["rows"] if r["second_order"] == second_order]

    def speed(library: str, engine: str = "") -> str:
        found = [f"{r['speed']:.2f}" for r in rows if r["library"] == library and (r["engine"] or "") == engine]
        return found[0] if found else "-"

    ours = rows[0]
    assert (ours["library"], ours["engine"]) == ("metalearn", "unroll")
    cells = [
        SPEED_SETTINGS[setting],
        "second" if second_order else "first",
        "{:.0f} ({:.0f} to {:.0f})".format(ours["median_ms"], *ours["quartiles_ms"]),
        f"**{ours['speed']:.2f}**",
        speed("metalearn", "checkpoint"),
        speed("metalearn", "adjoint"),
        *(speed(library) for library in ("hand-written loop", "higher", "TorchOpt")),
        f"{ours['gflops']:.0f}, {ours['percent_of_peak']:.0f}%",
    ]
    assert f"| {' | '.join(cells)} |" in README


# Label in the README's tables; engine, second order, task_chunk, whether snapshots are sparse.
ENGINE_ROWS: dict[str, tuple[str, bool, int | None, bool]] = {
    "first order, all {} tasks": ("unroll", False, None, False),
    "`unroll`, all {} tasks": ("unroll", True, None, False),
    "`checkpoint`, all {} tasks": ("checkpoint", True, None, False),
    "`adjoint`, all {} tasks": ("adjoint", True, None, False),
    "`checkpoint`, `task_chunk=4`": ("checkpoint", True, 4, False),
    "**`adjoint`, `task_chunk=4`**": ("adjoint", True, 4, False),
    "`adjoint`, `task_chunk=4`, sparse snapshots": ("adjoint", True, 4, True),
    "first order, one task at a time": ("unroll", False, 1, False),
    "`unroll`, one task at a time": ("unroll", True, 1, False),
    "`checkpoint`, one task at a time": ("checkpoint", True, 1, False),
    "`adjoint`, one task at a time": ("adjoint", True, 1, False),
    "`adjoint`, one task at a time, sparse snapshots": ("adjoint", True, 1, True),
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
def test_tables_of_the_engines_are_the_committed_ones(setting: str, tasks: int, steps: tuple[int, ...]) -> None:
    rows = engine_rows(setting)
    shown = 0
    for label, key in ENGINE_ROWS.items():
        if not any((*key, k) in rows for k in steps):
            continue
        at_ten = rows.get((*key, 10))
        ratio = at_ten and at_ten["ratio_to_unroll"]
        cells = [label.format(tasks), *(mib(rows.get((*key, k))) for k in steps), f"{ratio:.2f}" if ratio else "-"]
        assert f"| {' | '.join(cells)} |" in README
        shown += 1
    assert shown >= 9


@pytest.mark.parametrize(
    ("setting", "label"), [("5way_1shot", "5-way 1-shot, 15 queries"), ("5way_5shot", "5-way 5-shot, 15 queries")]
)
def test_table_of_more_queries_is_the_committed_one(setting: str, label: str) -> None:
    rows = engine_rows(setting)
    keys = [*list(ENGINE_ROWS.values())[:4], ("adjoint", True, 4, False)]
    at = {k: [mib(rows.get((*key, k))) for key in keys] for k in (1, 10)}
    cells = [f"{one} / {ten}" for one, ten in zip(at[1], at[10], strict=True)]
    assert f"| {label} | {' | '.join(cells)} |" in README


def test_exact_second_order_fits_into_first_order_memory() -> None:
    # The headline: less than first order on the same 16 tasks, and beyond the snapshots no growth with K.
    rows = engine_rows("20way_1shot")
    first = rows["unroll", False, None, False, 10]["peak_mib"]
    at_one, at_ten = (rows["adjoint", True, 4, False, k] for k in (1, 10))
    snapshots = 9 * 4 * 113_236 * 4 / 2**20  # nine more of four tasks' 113,236 weights in float32
    assert at_ten["peak_mib"] < first
    assert at_ten["peak_mib"] - snapshots < 1.05 * at_one["peak_mib"]
    assert at_ten["ratio_to_unroll"] < 1.4
    assert rows["adjoint", True, 4, True, 50]["peak_mib"] < rows["unroll", False, None, False, 1]["peak_mib"]


def test_verification_is_the_committed_one() -> None:
    report = read("verify-float64.json")
    errors: dict[bool, list[float]] = {True: [], False: []}
    for comparison in report["comparisons"]:
        errors[comparison["reference"] == "differences"].append(comparison["error"])
    assert report["right"]
    said = " ".join(README.split())
    assert f"{len(report['comparisons'])} comparisons in {report['seconds']:.0f} seconds" in said
    assert f"{max(errors[False]):.0e} against engines, libraries and the adapted weights" in said
    assert f"{max(errors[True]):.0e} against differences" in said


def test_lessons_are_the_committed_ones() -> None:
    lessons = read("lab/lessons.json")["lessons"]
    said = " ".join(README.split())
    assert all(lesson["right"] for lesson in lessons)
    assert f"All take {sum(lesson['seconds'] for lesson in lessons):.0f} seconds here" in said
    assert f"{sum(len(lesson['checks']) for lesson in lessons)} numbers" in said
    for lesson in lessons:
        assert f"| `{lesson['name']}` |" in README


def test_code_on_derivatives_runs() -> None:
    code = README.split("## The lab", 1)[1].split("```python\n", 1)[1].split("```", 1)[0]
    names: dict[str, Any] = {}
    exec(code, names)
    derivatives, f, w, v = (names[name] for name in ("derivatives", "f", "w", "v"))
    torch.testing.assert_close(derivatives.hvp(f, w, v), torch.tensor([1.0, -1.0]))
    torch.testing.assert_close(derivatives.hessian(f, w), torch.tensor([[2.0, 0.0], [0.0, -1.0]]), rtol=0, atol=1e-6)
    assert derivatives.top_eigenvalues(f, w, k=1).item() == pytest.approx(2)


def estimate(value: dict[str, float]) -> str:
    return f"{value['mean']:.2%} ± {value['ci95']:.2%}"


@pytest.mark.parametrize(
    ("folder", "label"),
    [
        ("glyphs-5w1s", "glyphs, 5-way 1-shot"),
        ("omniglot-5w1s", "Omniglot, 5-way 1-shot"),
        ("omniglot-20w1s", "Omniglot, 20-way 1-shot"),
    ],
)
def test_comparisons_are_the_committed_ones(folder: str, label: str) -> None:
    results = read(f"compare/{folder}/results.json")
    second, first = results["variants"]
    (difference,) = results["differences"]
    assert (second["name"], first["name"], results["complete"]) == ("second_order", "first_order", True)
    assert results["seeds"] == difference["seeds"] == [0, 1, 2]
    mean, ci95 = (100 * difference["accuracy"][name] for name in ("mean", "ci95"))
    assert mean > ci95, "second order is ahead beyond its interval"
    cells = [label, str(results["iterations"]), estimate(second["accuracy"]), estimate(first["accuracy"])]
    assert f"| {' | '.join(cells)} | {mean:.2f} ± {ci95:.2f} |" in README


def test_comparison_of_the_glyphs_is_the_committed_one() -> None:
    results = read("compare/glyphs-5w1s/results.json")
    for variant in results["variants"]:
        time_to = variant["time_to"]
        cells = [
            variant["name"].replace("_", " "),
            estimate(variant["accuracy"]),
            estimate(variant["nontransductive"]),
            f"{variant['meta_step_ms']:.0f}",
            f"{variant['peak_mib']:.0f}",
            f"{time_to['training_s']:.0f} s ({time_to['iterations']:.0f} meta-steps)",
        ]
        assert f"| {' | '.join(cells)} |" in README
    at = {(r["engine"], r["second_order"]): r for r in results["cost"] if r["steps"] == results["inner_steps"]}
    first, second = at["unroll", False], at["unroll", True]
    time, memory = (second[name] / first[name] for name in ("median_ms", "peak_mib"))
    said = " ".join(README.split())
    assert f"takes {time:.2f} times as long as first order's and {memory:.2f} times the memory" in said
    (difference,) = results["differences"]
    mean, ci95 = (100 * difference["accuracy"][name] for name in ("mean", "ci95"))
    assert f"Second order is {mean:.1f} ± {ci95:.1f} points ahead" in said
    assert f"time to {results['target_accuracy']:.0%} in validation" in README


def test_cost_at_20_ways_and_of_logging_is_the_committed_one() -> None:
    results = read("compare/omniglot-20w1s/results.json")
    at = {(r["engine"], r["second_order"]): r for r in results["cost"] if r["steps"] == results["inner_steps"]}
    time, memory = (at["unroll", True][name] / at["unroll", False][name] for name in ("median_ms", "peak_mib"))
    said = " ".join(README.split())
    assert f"takes {time:.2f} times as long as first order's and {memory:.2f} times the memory by `unroll`" in said
    logging = read("compare/logging.json")
    assert f"Logging took {logging['share']['all']:.1%} of the training time" in said
    assert f"its event files {logging['event_bytes'] / 1e6:.1f} MB" in said
    runs = [r["metrics"] for v in read("compare/glyphs-5w1s/results.json")["variants"] for r in v["runs"]]
    share = sum(m["time.logging_s"] for m in runs) / sum(m["time.training_s"] for m in runs)
    assert logging["share"]["all"] == pytest.approx(share, abs=1e-4)
    assert share < 0.03


def test_every_picture_is_there() -> None:
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert len(pictures) >= 6
    for picture in pictures:
        assert (REPO / picture).is_file(), picture


def test_faults_are_the_committed_ones() -> None:
    report = read("faults.json")
    for row in report["rows"].values():
        assert row["held"] == row["tries"], row["fault"]
        assert f"| {row['fault']} | {row['must_hold']} | {row['held']:,} of {row['tries']:,} |" in README
    assert [row.name for row in ROWS] == list(report["rows"])
    assert all(len(range(row.tries)) * row.cases == report["rows"][row.name]["tries"] for row in ROWS)
    share = report["rows"]["checkpoint_cost"]["measured"]["share_of_training_time"]
    assert f"at {share:.2%} of the training time" in README


def test_the_sweep_on_a_cluster_composes() -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    command = README.split("python scripts/train.py --multirun inner.second_order=true,false", 1)[1].split("```", 1)[0]
    overrides = [o.split(",")[0] for o in shlex.split(command.replace("\\\n", " ")) if "=" in o]
    assert "run.seed=0" in overrides
    launcher = compose("train", overrides, return_hydra_config=True).hydra.launcher
    assert launcher._target_.endswith("SlurmLauncher")
    assert (launcher.partition, launcher.gpus_per_node, launcher.timeout_min) == ("gpu", 1, 600)
