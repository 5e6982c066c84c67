"""The README says what is true: its code runs, its defaults are the defaults, its figures are the committed ones."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from omegaconf import OmegaConf

from metalearn.runs.config import compose
from tests.conftest import REPO

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


@pytest.mark.parametrize("name", ["default", "omniglot_20way_1shot"])
@pytest.mark.parametrize("second_order", [True, False])
def test_benchmark_rows_are_the_committed_ones(name: str, second_order: bool) -> None:
    report = read(f"benchmark/{name}.json")
    ours, theirs = (
        next(r for r in report["rows"] if r["library"] == library and r["second_order"] == second_order)
        for library in ("metalearn", "learn2learn")
    )

    def times(row: dict[str, Any]) -> str:
        return "{:.0f} ({:.0f} to {:.0f})".format(row["median_ms"], *row["quartiles_ms"])

    order = "second order" if second_order else "first order"
    memory = f"{ours['peak_mib']:.0f} / {theirs['peak_mib']:.0f} MiB"
    cells = [order, times(ours), times(theirs), f"{ours['ratio_to_learn2learn']:.2f}", memory]
    task = report["task"]
    setting = f"{task['ways']}-way {task['shots']}-shot, {task['meta_batch']} tasks, {task['queries']} quer"
    assert any(setting in line and f"| {' | '.join(cells)} |" in line for line in README.splitlines())
