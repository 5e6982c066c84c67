"""The committed report has every case of this folder; ``docs/results.md`` shows it."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from pathlib import Path

from tests.paths import REPO

REPORT = json.loads((REPO / "outputs" / "reference" / "faults.json").read_text())["rows"]


def test_report_has_every_case() -> None:
    cases: Counter[str] = Counter()
    for path in Path(__file__).parent.glob("test_*.py"):
        for name, function in vars(importlib.import_module(f"tests.faults.{path.stem}")).items():
            marks = {mark.name: mark for mark in getattr(function, "pytestmark", [])}
            if "fault" in marks:
                tried = len(marks["parametrize"].args[1]) if "parametrize" in marks else 1
                cases[name.removeprefix("test_")] = tried * marks["fault"].kwargs.get("cases", 1)
    assert cases == {name: row["tries"] for name, row in REPORT.items()}
