"""The README's table of faults is that of the committed report, and the report has every case of this folder."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from pathlib import Path

from tests.paths import REPO

REPORT = json.loads((REPO / "outputs" / "reference" / "faults.json").read_text())["rows"]
README = (REPO / "README.md").read_text()


def test_readme_has_every_row() -> None:
    for row in REPORT.values():
        assert row["held"] == row["tries"], row["fault"]
        assert f"| {row['fault']} | {row['must_hold']} | {row['held']:,} of {row['tries']:,} |" in README
    share = REPORT["checkpoint_cost"]["measured"]["share_of_training_time"]
    assert f"at {share:.2%} of the training time" in README


def test_report_has_every_case() -> None:
    cases: Counter[str] = Counter()
    for path in Path(__file__).parent.glob("test_*.py"):
        for name, function in vars(importlib.import_module(f"tests.faults.{path.stem}")).items():
            marks = {mark.name: mark for mark in getattr(function, "pytestmark", [])}
            if "fault" in marks:
                tried = len(marks["parametrize"].args[1]) if "parametrize" in marks else 1
                cases[name.removeprefix("test_")] = tried * marks["fault"].kwargs.get("cases", 1)
    assert cases == {name: row["tries"] for name, row in REPORT.items()}
