"""A comparison's results, written as files and for TensorBoard, and printed."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import rich
import torch
from PIL import Image

from metalearn.commands.compare.markup import escape, table
from metalearn.commands.compare.report import write_report
from metalearn.commands.compare.results import Results
from metalearn.commands.compare.summary import headline
from metalearn.commands.compare.tables import variant_rows
from metalearn.commands.compare.variants import Job
from metalearn.config.output_names import RESULTS_FILE
from metalearn.config.schema import result_keys
from metalearn.core import serialization as files
from metalearn.training.tracking.console import print_line, print_path, print_table
from metalearn.training.tracking.tensorboard import ReportLogger

REPORT_RUN = "report"
"""The folder of the report's own event file, a run in TensorBoard."""

_WIDE = 140  # characters
_ONLY_IF_WIDE = ("non-transductive", "training time")


def write_results(results: Results, every: Sequence[Job], folder: Path) -> None:
    """The report, also for TensorBoard, and ``results.json`` last: it marks the comparison as ended."""
    write_report(results, folder)
    pictures = {path.stem: np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.glob("plots/*.png"))}
    text = "\n\n".join([*(escape(sentence) for sentence in headline(results)), table(*variant_rows(results))])
    ReportLogger(folder / REPORT_RUN).report(text, pictures, runs=[result_keys(job.config) for job in every])
    content = {"complete": results.complete, "torch": str(torch.__version__), **asdict(results)}
    files.atomic_write_text(folder / RESULTS_FILE, json.dumps(content, indent=2) + "\n")


def print_results(results: Results, folder: Path) -> None:
    """The table and the headline in the terminal, and where everything lies."""
    header, rows = variant_rows(results)
    if rich.get_console().width < _WIDE:
        kept = [i for i, name in enumerate(header) if name not in _ONLY_IF_WIDE]
        header = ["\n".join(header[i].rsplit(" ", 1)) for i in kept]
        # Of the time to the target, the time; names may hold commas.
        rows = [[row[i].partition(",")[0] if i else row[i] for i in kept] for row in rows]
    print_table(f"{results.title}, {results.iterations} meta-steps, seeds {results.seeds}", header, rows)
    for sentence in headline(results):
        print_line(sentence)
    for run in (run for variant in results.variants for run in variant.failed):
        print_line(f"{run.folder} failed: {run.reason}")
    if not results.complete:
        print_line("Not every run is finished: the same command tries those again, and trains no other.")
    print_path("Report", folder / "report.html")
    print_line(f"TensorBoard: tensorboard --logdir {shlex.quote(str(folder))}")
