"""The committed report has every case of this folder; ``docs/results.md`` shows it."""

from __future__ import annotations

import importlib
import json
import math
from collections import Counter
from pathlib import Path

from tests.paths import REPO

REPORT = json.loads((REPO / "outputs" / "reference" / "faults.json").read_text())["rows"]


def test_report_has_every_case() -> None:
    cases: Counter[str] = Counter()
    for path in Path(__file__).parent.glob("test_*.py"):
        for name, function in vars(importlib.import_module(f"tests.faults.{path.stem}")).items():
            marks = getattr(function, "pytestmark", [])
            tried = math.prod(len(mark.args[1]) for mark in marks if mark.name == "parametrize")
            for mark in marks:
                if mark.name == "fault":
                    cases[name.removeprefix("test_")] = tried * mark.kwargs.get("cases", 1)
    assert cases == {name: row["tries"] for name, row in REPORT.items()}
