"""The README's table of reproduced rows equals that of the committed results."""

from __future__ import annotations

import pytest

from metalearn.commands.reproduce.run import README, REFERENCE
from metalearn.commands.reproduce.table import BEGIN, between_markers, read_rows, readme_table
from tests.paths import REPO


def test_readme_table_equals_committed_results() -> None:
    readme = (REPO / README).read_text()
    assert BEGIN in readme
    assert between_markers(readme) == readme_table(read_rows(REPO / REFERENCE))


def test_recorded_rows_follow_the_protocol() -> None:
    if not (REPO / REFERENCE).exists():
        pytest.skip("no row is recorded: python scripts/reproduce.py experiment_name=… update_reference=true")
    for row in read_rows(REPO / REFERENCE):
        assert row["dataset"] == "omniglot"
        assert row["test_tasks"] >= 600
        assert row["seeds"] == [run["seed"] for run in row["runs"]]
        assert row["nontransductive"] is not None
        assert all(run["chosen_at"] <= row["iterations"] for run in row["runs"])
