"""A whole comparison: runs that are missing are trained, costs measured, and everything reported.

What is finished is kept, so that the same command goes on where an interrupted one stopped.
"""

from __future__ import annotations

import json
import logging
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import rich
import torch
from PIL import Image

from metalearn import files
from metalearn.errors import RunError
from metalearn.runs.checks import compared_keys
from metalearn.runs.compare.cost import cost
from metalearn.runs.compare.gather import differences, gather
from metalearn.runs.compare.launch import launch, launch_by_hydra, runs_at_a_time
from metalearn.runs.compare.markup import escape, table
from metalearn.runs.compare.names import RECORD, RESULTS, identity, read_record
from metalearn.runs.compare.report import headline, variant_rows, write_report
from metalearn.runs.compare.results import Results
from metalearn.runs.compare.variants import Job, Variant, find_variants, jobs, settled
from metalearn.runs.config import launcher_overrides, refuse_taken
from metalearn.runs.config_files import to_yaml
from metalearn.runs.console import print_line, print_path, print_table, progress_bar
from metalearn.runs.experiment import pick_device
from metalearn.runs.folders import locked
from metalearn.runs.machine import machine
from metalearn.runs.schema_commands import CompareConfig
from metalearn.runs.tracking import ReportTracker

log = logging.getLogger(__name__)

_WIDE = 140  # characters
_ONLY_IF_WIDE = ("non-transductive", "training time")

REPORT_RUN = "report"
"""The folder of the report's own event file, a run in TensorBoard."""


def run_comparison(config: CompareConfig, folder: Path) -> bool:
    """Train what is left to train, measure, and report.

    Args:
        config: checked.
        folder: the comparison's own; it may hold a part of it.

    Returns:
        Whether every run is finished.

    Raises:
        RunError: if the folder holds another comparison, or another process is at work there.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that no child is left behind
    with locked(folder, wait=False):
        claim(config, folder)
        print_path("Comparison folder", folder)
        variants = settled(find_variants(config))
        every = jobs(variants, config.compare.seeds, folder)
        reasons = train_missing(every, config.compare.jobs, folder)
        results = collect(config, variants, every, reasons, folder)
        write_results(results, every, folder)
        show(results, folder)
    return results.complete


def claim(config: CompareConfig, folder: Path) -> None:
    """Make a locked folder this comparison's, or find that it is.

    More seeds, other variants or another target may be asked of a comparison later: what is finished stays.

    Raises:
        RunError: if it was begun with another configuration of the training.
        FolderTakenError: if it holds a run.
    """
    path = folder / RECORD
    if not path.exists():
        refuse_taken(folder)
    else:
        log.info("Going on with the comparison in %s", folder)
        now, before = identity(json.loads(json.dumps(asdict(config)))), identity(read_record(folder))
        differing = [
            f"{section}.{name}: {before.get((section, name))} in the folder, {now.get((section, name))} now"
            for section, name in sorted({*now, *before})
            if section != "compare" and now.get((section, name)) != before.get((section, name))
        ]
        if differing:
            raise RunError(
                f"{folder} holds another comparison:\n"
                + "\n".join(differing)
                + "\nTake another folder, or the same values."
            )
    files.write_text(path, to_yaml(config))


def train_missing(every: Sequence[Job], at_a_time: int | None, folder: Path) -> dict[Path, str]:
    """Train the runs that are not finished; why some failed, by their folder."""
    left = [job for job in every if not (job.folder / "metrics.json").exists()]
    if done := len(every) - len(left):
        log.info("%d of %d runs are finished already", done, len(every))
    if not left:
        return {}
    if launcher := launcher_overrides():
        log.info("%d runs through %s", len(left), launcher[0])
        return launch_by_hydra(left, launcher, folder)
    number = runs_at_a_time(left, at_a_time)
    log.info("%d runs, %d at a time", len(left), number)
    with progress_bar() as progress:
        return launch(left, at_a_time=number, progress=progress)


def collect(
    config: CompareConfig, variants: list[Variant], every: list[Job], reasons: Mapping[Path, str], folder: Path
) -> Results:
    """All figures, with the cost of one meta-gradient measured now unless it was before."""
    found, target = gather(variants, every, reasons, config.compare.target_accuracy)
    base = variants[0].config
    device = pick_device(base.run.device)
    with progress_bar() as progress:
        rows = cost(base, config.compare, folder, progress)
    task = base.task
    return Results(
        title=f"{base.data.name}, {task.ways}-way {task.shots}-shot",
        dataset=base.data.name,
        command=shlex.join(["python", *sys.argv]),
        config=to_yaml(config),
        machine=machine(device),
        memory_kind="cuda" if device.type == "cuda" else "cpu-tensors",
        iterations=base.outer.iterations,
        seeds=list(config.compare.seeds),
        target_accuracy=target,
        inner_steps=base.inner.steps,
        variants=found,
        differences=differences(variants, found, folder),
        cost=rows,
        cost_limit_mib=config.compare.limit_mib,
    )


def write_results(results: Results, every: Sequence[Job], folder: Path) -> None:
    """The report, also for TensorBoard, and ``results.json`` last: it marks the comparison as ended."""
    write_report(results, folder)
    pictures = {path.stem: np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.glob("plots/*.png"))}
    text = "\n\n".join([*(escape(sentence) for sentence in headline(results)), table(*variant_rows(results))])
    ReportTracker(folder / REPORT_RUN).report(text, pictures, runs=[compared_keys(job.config) for job in every])
    content = {"complete": results.complete, "torch": str(torch.__version__), **asdict(results)}
    files.write_text(folder / RESULTS, json.dumps(content, indent=2) + "\n")


def show(results: Results, folder: Path) -> None:
    """The table and the headline in the terminal, and where everything lies."""
    header, rows = variant_rows(results)
    if rich.get_console().width < _WIDE:
        kept = [i for i, name in enumerate(header) if name not in _ONLY_IF_WIDE]
        header, rows = [header[i] for i in kept], [[row[i] for i in kept] for row in rows]
    print_table(f"{results.title}, {results.iterations} meta-steps, seeds {results.seeds}", header, rows)
    for sentence in headline(results):
        print_line(sentence)
    for run in (run for variant in results.variants for run in variant.failed):
        print_line(f"{run.folder} failed: {run.reason}")
    print_path("Report", folder / "report.html")
    print_path("TensorBoard: tensorboard --logdir", folder)
    if not results.complete:
        print_line("Not every run is finished; with this folder as hydra.run.dir the same command tries those again.")
