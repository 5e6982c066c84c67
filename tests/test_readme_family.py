"""The README's tables of the family and of sinusoids are those that the committed figures make."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

from metalearn.commands.compare.statistics import seed_ci
from tests.conftest import REPO

REFERENCE = REPO / "outputs" / "reference"
NAMES = {"first_order": "maml, first order", "backend-learn2learn": "maml, by learn2learn"}


def between(name: str) -> str:
    return (REPO / "README.md").read_text().split(f"<!-- {name} -->\n", 1)[1].split(f"<!-- /{name} -->", 1)[0]


def family_table() -> str:
    """Every variant of ``outputs/reference/compare/algorithms``, in its order."""
    results = json.loads((REFERENCE / "compare" / "algorithms" / "results.json").read_text())
    head = "| algorithm | test accuracy | non-transductive | inner steps | ms per meta-step | peak MiB |"
    return "\n".join([head, "|---|---|---|---|---|---|", *map(_family_row, results["variants"])]) + "\n"


def _family_row(variant: dict[str, Any]) -> str:
    words = variant["name"].removeprefix("algorithm-").split(",")
    accuracy, alone = (f"{v['mean']:.2%} ± {v['ci95']:.2%}" for v in (variant["accuracy"], variant["nontransductive"]))
    steps = len(variant["per_step"]) - 1
    return (
        f"| {NAMES.get(words[-1], words[0])} | {accuracy} | {alone} | {steps} "
        f"| {variant['meta_step_ms']:.0f} | {variant['peak_mib']:.0f} |"
    )


def sinusoid_table() -> str:
    """Mean squared errors over the seeds of ``outputs/reference/sinusoid``."""
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in sorted((REFERENCE / "sinusoid").glob("*.json")):
        metrics = json.loads(path.read_text())
        runs[metrics["task"]].append(metrics)
    lines = ["| points | before | after 1 step | after 10 steps | seeds |", "|---|---|---|---|---|"]
    for task in sorted(runs, key=lambda task: -int(task.partition("-")[0])):
        cells = []
        for k in (0, 1, 10):
            means, halves = ([m[f"test.{name}_per_step"][k] for m in runs[task]] for name in ("mse", "ci95"))
            found = seed_ci(means, halves)
            cells.append(f"{found.mean:.2f} ± {found.ci95:.2f}")
        lines.append(f"| {task.partition('-')[0]} | {' | '.join(cells)} | {len(runs[task])} |")
    return "\n".join(lines) + "\n"


def test_the_familys_table_is_the_committed_one() -> None:
    assert family_table() in between("family")


def test_the_sinusoids_table_is_the_committed_one() -> None:
    assert sinusoid_table() in between("sinusoid")


def test_what_the_family_was_compared_for_holds() -> None:
    results = json.loads((REFERENCE / "compare" / "algorithms" / "results.json").read_text())
    found = {v["name"].removeprefix("algorithm-"): v["accuracy"]["mean"] for v in results["variants"]}
    assert min(found.values()) > 0.4, "chance is 0.2"
    assert found["maml_pp"] >= found["maml"]


def test_sinusoids_are_learned_as_the_paper_has_it() -> None:
    for path in (REFERENCE / "sinusoid").glob("shots10-*.json"):
        errors = json.loads(path.read_text())["test.mse_per_step"]
        assert errors[1] < 0.8, "well under 1 after one step"
        assert errors[10] < errors[1], "and falling on"
