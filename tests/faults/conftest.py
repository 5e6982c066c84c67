"""Record the results for every fault, and write them to the file that the table of faults is made of.

``make faults`` tries all cases; the default run a few of each. Tests name their fault by
``@pytest.mark.fault(fault, must_hold, cases=…)``, where ``cases`` is how many cases one test tries, 1 by default.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from metalearn.core import serialization as files
from metalearn.core.profiling.hardware import describe_hardware


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults-report", type=Path, help="JSON file to write; its rows that are not tried are kept")


def pytest_configure(config: pytest.Config) -> None:
    if path := config.getoption("--faults-report", None):
        config.pluginmanager.register(FaultsReport(path))


@pytest.fixture(autouse=True)
def _record_fault(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> None:
    """Record in pytest's report the fault that a test causes."""
    if mark := request.node.get_closest_marker("fault"):
        fault, must_hold = mark.args
        record_property("fault", (fault, must_hold, mark.kwargs.get("cases", 1)))


class FaultsReport:
    """A pytest plugin that counts the passed cases of every fault, and writes the counts at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        recorded: dict[str, Any] = dict(report.user_properties)
        if "fault" not in recorded or report.skipped or (report.when != "call" and report.passed):
            return
        fault, must_hold, cases = recorded.pop("fault")
        name, _, case = report.nodeid.rpartition("::test_")[2].partition("[")
        row = self.rows.setdefault(
            name, {"fault": fault, "must_hold": must_hold, "tries": 0, "held": 0, "seconds": 0.0, "failures": []}
        )
        row["tries"] += cases
        row["held"] += cases if report.passed else 0
        row["seconds"] += report.duration
        if report.failed:
            error = [line[1:].strip() for line in report.longreprtext.splitlines() if line.startswith("E ")]
            row["failures"].append(f"[{case} {' '.join(error)[:500]}")
        for measure, value in recorded.items():
            measured = row.setdefault("measured", {})
            measured[measure] = max(value, measured.get(measure, value))

    def pytest_sessionfinish(self) -> None:
        for row in self.rows.values():
            row["seconds"] = round(row["seconds"], 1)
        before = json.loads(self.path.read_text())["rows"] if self.path.exists() else {}
        machine = describe_hardware(torch.device("cpu"))
        report = {"command": "make faults", "machine": machine, "rows": {**before, **self.rows}}
        files.atomic_write_text(self.path, json.dumps(report, indent=2, ensure_ascii=False) + "\n")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("faults")
        for row in self.rows.values():
            terminalreporter.line(
                f"{row['held']:6,} of {row['tries']:,} held in {row['seconds']:.0f} s: {row['fault']}"
            )
        terminalreporter.line(f"Written to {self.path}")
