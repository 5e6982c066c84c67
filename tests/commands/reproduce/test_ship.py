"""The models that are shipped: chosen on validation classes, and as good as their card says."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

import metalearn
from metalearn.commands.reproduce.run import REFERENCE
from metalearn.commands.reproduce.ship import MODEL_CARD, ship
from metalearn.commands.reproduce.table import read_rows
from metalearn.config.run_config import load_trusted_config, relocate_data
from metalearn.core.errors import RunError
from metalearn.pretrained.model_file import PRETRAINED, find_run, pretrained_models
from metalearn.training.evaluate_run import evaluate_run
from tests.paths import REPO
from tests.training.run_folders import trained

SHIPPED = ["omniglot-20w1s", "omniglot-20w5s", "omniglot-5w1s", "omniglot-5w5s"]


@pytest.fixture
def rows_dir(tmp_path: Path) -> Path:
    """Two rows of a setting, of two seeds each."""
    first = trained(tmp_path / "rows" / "row" / "second_order-seed0")
    for folder in ("row/second_order-seed1", "other/first_order-seed0", "other/first_order-seed1"):
        shutil.copytree(first, tmp_path / "rows" / folder)
    return tmp_path / "rows"


def recorded(experiment: str, order: str, validation: tuple[float, float], test: float) -> dict[str, Any]:
    runs = [{"seed": seed, "validation": score, "accuracy": test} for seed, score in enumerate(validation)]
    accuracy = {"mean": 0.5, "ci95": 0.1, "over": "seeds"}
    row = {"experiment": experiment, "order": order, "ways": 5, "shots": 1, "runs": runs}
    return {**row, "accuracy": accuracy, "published": None}


def test_best_seed_of_the_best_row_is_shipped(rows_dir: Path, tmp_path: Path) -> None:
    # The other row has the best seed of all, but not the best mean.
    test = json.loads((rows_dir / "row" / "second_order-seed0" / "metrics.json").read_text())["test.accuracy"]
    rows = [recorded("row", "second", (0.90, 0.92), test), recorded("other", "first", (0.80, 0.99), test)]
    ship(rows, rows_dir, tmp_path / "pretrained")
    path = tmp_path / "pretrained" / "omniglot-5w1s.safetensors"
    assert {p.name for p in path.parent.iterdir()} == {path.name, MODEL_CARD}
    card = metalearn.load(path, "cpu").card
    assert card["recipe"] == "experiment=row inner.second_order=true run.seed=1"
    run = json.loads((rows_dir / "row" / "second_order-seed1" / "metrics.json").read_text())
    assert {name: card[name] for name in run} == run
    text = (path.parent / MODEL_CARD).read_text()
    for fact in (
        hashlib.sha256(path.read_bytes()).hexdigest(),
        f"{run['test.accuracy']:.2%} ± {run['test.ci95']:.2%}, 4 tasks",
        "50.00% ± 10.00%",
        "## omniglot-5w1s",
    ):
        assert fact in text


def test_nothing_is_shipped_if_a_run_is_not_the_recorded_one(rows_dir: Path, tmp_path: Path) -> None:
    test = json.loads((rows_dir / "row" / "second_order-seed0" / "metrics.json").read_text())["test.accuracy"]
    rows = [recorded("row", "second", (0.9, 0.92), test), {**recorded("other", "first", (0.9, 0.9), 2.0), "shots": 5}]
    with pytest.raises(RunError, match=r"other/first_order-seed0: this is not the run of the recorded row"):
        ship(rows, rows_dir, tmp_path / "pretrained")
    assert not (tmp_path / "pretrained").exists()


def test_models_are_of_the_recorded_rows() -> None:
    assert pretrained_models() == SHIPPED
    text, rows = (PRETRAINED / MODEL_CARD).read_text(), read_rows(REPO / REFERENCE)
    for name in SHIPPED:
        path = find_run(name)
        assert hashlib.sha256(path.read_bytes()).hexdigest() in text
        assert path.stat().st_size < 2**20
        card = metalearn.load(name, "cpu").card
        found = [
            run["accuracy"]
            for row in rows
            for run in row["runs"]
            if card["recipe"].startswith(f"experiment={row['experiment']} ") and run["seed"] == card["seed"]
        ]
        assert card["test.accuracy"] in found


@pytest.mark.parametrize("name", SHIPPED)
def test_model_is_as_accurate_on_held_out_classes_as_its_card_says(
    name: str, omniglot_root: str, tmp_path: Path
) -> None:
    trained = load_trusted_config(name, trust_code=False)
    config = dataclasses.replace(
        trained,
        data=relocate_data(trained.data, omniglot_root),
        eval=dataclasses.replace(trained.eval, episodes=100),
    )
    evaluate_run(config, find_run(name), tmp_path)
    found, card = json.loads((tmp_path / "metrics.json").read_text()), metalearn.load(name, "cpu").card
    for kind in ("", "_nontransductive"):
        bound = 2 * math.hypot(card[f"test.ci95{kind}"], found[f"test.ci95{kind}"])
        assert abs(found[f"test.accuracy{kind}"] - card[f"test.accuracy{kind}"]) < bound
