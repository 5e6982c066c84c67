"""The README's table of reproduced rows is the one that the committed figures make."""

from __future__ import annotations

import pytest

from metalearn.commands.reproduce.run import README, REFERENCE
from metalearn.commands.reproduce.table import BEGIN, between_markers, read_rows, readme_table
from tests.conftest import REPO


def test_the_table_of_reproduced_rows_is_the_committed_one() -> None:
    assert REPO / "README.md" == README
    readme = README.read_text()
    assert BEGIN in readme
    assert between_markers(readme) == readme_table(read_rows(REFERENCE))


def test_recorded_rows_keep_to_the_protocol() -> None:
    if not REFERENCE.exists():
        pytest.skip("no row is recorded: python scripts/reproduce.py experiment_name=… update_reference=true")
    for row in read_rows(REFERENCE):
        assert row["dataset"] == "omniglot"
        assert row["test_tasks"] >= 600
        assert row["seeds"] == [run["seed"] for run in row["runs"]]
        assert row["nontransductive"] is not None
        assert all(run["chosen_at"] <= row["iterations"] for run in row["runs"])
