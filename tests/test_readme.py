"""The README says what is true: its code runs, its defaults are the defaults, its figures are the committed ones."""

from __future__ import annotations

import json
import re

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


@pytest.mark.parametrize("folder", ["omniglot-5w1s", "glyphs-5w1s"])
@pytest.mark.parametrize("order", ["second", "first"])
def test_results_are_the_committed_ones(folder: str, order: str) -> None:
    metrics = json.loads((REFERENCE / folder / f"maml-{order}_order-seed0" / "metrics.json").read_text())
    accuracy = f"{metrics['test.accuracy']:.2%} ± {metrics['test.ci95']:.2%}"
    alone = f"{metrics['test.accuracy_nontransductive']:.2%} ± {metrics['test.ci95_nontransductive']:.2%}"
    row = f"| {metrics['dataset']} | {order} order | {accuracy} | {alone} | {metrics['memory.peak_mib']:.0f} MiB |"
    assert row in README, row


def test_benchmark_rows_are_the_committed_ones() -> None:
    for name in ("default", "omniglot_20way_1shot"):
        report = json.loads((REFERENCE / "benchmark" / f"{name}.json").read_text())
        for row in report["rows"]:
            if row["library"] == "metalearn":
                assert f"{row['ratio_to_learn2learn']:.2f}" in README, (name, row)
