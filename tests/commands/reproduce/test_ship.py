"""Models to ship are those of recorded rows, chosen on validation classes."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import metalearn
from metalearn.commands.reproduce.ship import MODEL_CARD, ship
from metalearn.core.errors import RunError
from tests.training.run_folders import trained


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
