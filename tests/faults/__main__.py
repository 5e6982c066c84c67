"""Bring about every fault as often as the README's table says, and write what held.

Run it as ``python -m tests.faults`` (``make faults``); ``--only NAME`` takes one row, ``--output FILE`` another file.
The exit code is 1 if anything did not hold.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from metalearn.core import serialization as files
from metalearn.core.profiling.hardware import describe_hardware
from metalearn.training.tracking.console import print_path, print_table, progress_bar
from tests.conftest import REPO
from tests.faults.rows import ROWS
from tests.faults.suite import outcome

OUTPUT = REPO / "outputs" / "reference" / "faults.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", action="append", choices=[row.name for row in ROWS], help="this row; may be repeated")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where to write; rows that are not run are kept")
    flags = parser.parse_args()
    rows = [row for row in ROWS if flags.only is None or row.name in flags.only]
    found: dict[str, Any] = json.loads(flags.output.read_text())["rows"] if flags.only and flags.output.exists() else {}
    shown = [row for row in ROWS if row in rows or row.name in found]
    with tempfile.TemporaryDirectory(prefix="faults-") as folder, progress_bar() as progress:
        bar = progress.add_task("faults", total=sum(row.tries * row.seconds for row in rows), note="")
        for row in rows:
            progress.update(bar, note=row.fault)
            advance = functools.partial(progress.advance, bar, row.seconds)
            result = outcome(row, range(row.tries), Path(folder), done=advance)
            found[row.name] = {"fault": row.fault, "must_hold": row.must_hold, **result}
    report = {
        "command": "python -m tests.faults",
        "machine": describe_hardware(torch.device("cpu")),
        "rows": {row.name: found[row.name] for row in shown},
    }
    files.atomic_write_text(flags.output, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    results = [found[row.name] for row in shown]
    table = [[r["fault"], str(r["tries"]), str(r["held"]), f"{r['seconds']:.0f}"] for r in results]
    print_table("Faults", ["fault", "tries", "held", "s"], table)
    for row in shown:
        for failure in found[row.name]["failures"]:
            print(f"{row.name} {failure}", file=sys.stderr)
    print_path("Written to", flags.output)
    return int(any(result["held"] < result["tries"] for result in found.values()))


if __name__ == "__main__":
    sys.exit(main())
