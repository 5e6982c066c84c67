"""The models that are shipped are those of the recorded rows, and as good as their card says."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path

import pytest

import metalearn
from metalearn.commands.reproduce.run import REFERENCE
from metalearn.commands.reproduce.ship import MODEL_CARD
from metalearn.commands.reproduce.table import read_rows
from metalearn.config.run_config import load_trusted_config, relocate_data
from metalearn.pretrained.model_file import PRETRAINED, find_run, pretrained_models
from metalearn.training.evaluate_run import evaluate_run
from tests.paths import REPO

SHIPPED = ["omniglot-20w1s", "omniglot-20w5s", "omniglot-5w1s", "omniglot-5w5s"]
TASKS = {"omniglot-20w1s": 3, "omniglot-20w5s": 2, "omniglot-5w1s": 50, "omniglot-5w5s": 10}
"""Some seconds of each; a task of 20 ways and 5 shots takes as long as a hundred of 5 ways and 1 shot."""


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


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n == "omniglot-20w5s" else ()) for n in SHIPPED]
)
def test_model_is_as_accurate_on_held_out_classes_as_its_card_says(
    name: str, omniglot_root: str, tmp_path: Path
) -> None:
    trained = load_trusted_config(name, trust_code=False)
    config = dataclasses.replace(
        trained,
        data=relocate_data(trained.data, omniglot_root),
        eval=dataclasses.replace(trained.eval, episodes=TASKS[name]),
    )
    evaluate_run(config, find_run(name), tmp_path)
    found, card = json.loads((tmp_path / "metrics.json").read_text()), metalearn.load(name, "cpu").card
    for kind in ("", "_nontransductive"):
        bound = 1.5 * card[f"test.ci95{kind}"] * math.sqrt(trained.eval.episodes / TASKS[name])  # 3 standard errors
        assert abs(found[f"test.accuracy{kind}"] - card[f"test.accuracy{kind}"]) < bound
