"""A row of the table, reproduced: what is missing is trained, in slices if that is asked for, and gathered.

What is finished is kept, so that the same command goes on where a slice, a signal or a power cut ended it.
"""

from __future__ import annotations

import logging
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from metalearn.commands.compare.launch import launch
from metalearn.commands.compare.variants import Job
from metalearn.commands.reproduce.gather import figures, read_metrics
from metalearn.commands.reproduce.plan import TableRow, build_rows, resolve_row
from metalearn.commands.reproduce.table import (
    BEGIN,
    END,
    FILE,
    between_markers,
    format_interval,
    read_rows,
    readme_table,
    refuse_fewer_seeds,
    replace_table,
    upsert_row,
)
from metalearn.config.commands_schema import ReproduceConfig
from metalearn.config.compose import CONF
from metalearn.config.run_folder import folder_lock
from metalearn.core import serialization as files
from metalearn.training.checkpoints import state_paths
from metalearn.training.runtime.signals import SIGHUP, sigterm_as_exception
from metalearn.training.tracking.console import print_line, print_path, print_table, progress_bar

log = logging.getLogger(__name__)

FINISHED, FAILED, UNFINISHED = 0, 1, 75
"""Exit codes; the last is ``EX_TEMPFAIL`` of ``sysexits.h``: try again."""

REFERENCE = CONF.parent / "outputs" / "reference" / FILE
README = CONF.parent / "README.md"


class TimeLimitReached(BaseException):
    """The time of a slice has run out; no ``Exception``, so that nothing takes it for a run's failure."""


def run_reproduction(config: ReproduceConfig, folder: Path) -> int:
    """Train what is left to train, for as long as asked, and gather every order whose runs are all finished.

    Args:
        config: checked.
        folder: of all reproductions.

    Returns:
        The exit code.

    Raises:
        RunError: if a run's folder holds another configuration's, another process is at work on the row, or more
            seeds are recorded of it than are asked for.
    """
    rows = [resolve_row(row) for row in build_rows(config, folder)]
    every = [job for row in rows for job in row.jobs]
    with folder_lock(folder / config.experiment_name, wait=False), sigterm_as_exception(*SIGHUP):
        for row in rows:
            for path in output_files(folder, record=config.update_reference):
                refuse_fewer_seeds(path, row.experiment, row.order, row.seeds)
        print_path("Row folder", folder / config.experiment_name)
        try:
            reasons = train_missing(every, config)
        except TimeLimitReached:
            print_line(f"The slice of {config.time_limit_minutes:g} minutes is over.")
            reasons = {}
        except (KeyboardInterrupt, SystemExit):
            show_unfinished(every, {})
            raise
        measured = [found for row in rows if (found := collect_row(row)) is not None]
        for found in measured:
            save_row(found, folder, record=config.update_reference)
    show(measured)
    if len(measured) == len(rows):
        return FINISHED
    show_unfinished(every, reasons)
    return FAILED if reasons else UNFINISHED


def output_files(folder: Path, *, record: bool) -> list[Path]:
    """The files that a row is written into."""
    return [folder / FILE, *([REFERENCE] if record else [])]


def train_missing(every: Sequence[Job], config: ReproduceConfig) -> Mapping[Path, str]:
    """Train the runs that are not finished; why some failed, by their folder.

    Raises:
        SliceOver: when the time is over; every run in progress has put its state away.
    """
    left = [job for job in every if read_metrics(job) is None]
    if done := len(every) - len(left):
        log.info("%d of %d runs are finished already", done, len(every))
    if not left:
        return {}
    with progress_bar() as progress, time_limit(config.time_limit_minutes):
        return launch(left, at_a_time=min(config.jobs, len(left)), progress=progress)


@contextmanager
def time_limit(minutes: float | None) -> Iterator[None]:
    """Raise ``TimeLimitReached`` in the block once so much time has passed; never if ``None``."""
    if minutes is None:
        yield
        return

    def over(number: int, frame: FrameType | None) -> None:
        raise TimeLimitReached

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def collect_row(row: TableRow) -> dict[str, Any] | None:
    """The row's figures; ``None`` while a run of it is not finished."""
    metrics = [found for job in row.jobs if (found := read_metrics(job)) is not None]
    return figures(row, metrics) if len(metrics) == len(row.jobs) else None


def save_row(row: Mapping[str, Any], folder: Path, *, record: bool) -> None:
    """Write a row beside the runs and, if it is to be recorded, among the reference figures and into the README.

    Raises:
        RunError: if a file holds the row with more seeds.
    """
    with folder_lock(folder, wait=True):  # another row's reproduction may write at this moment
        for path in output_files(folder, record=record):
            files.atomic_write_text(path, upsert_row(path, row))
            print_path("Figures", path)
        if record:
            write_readme(read_rows(REFERENCE))


def write_readme(rows: Sequence[Mapping[str, Any]]) -> None:
    """Bring the README's table up to date, or print it where its place is not marked."""
    content, readme = readme_table(rows), README.read_text()
    if between_markers(readme) is None:
        print_line(f"{README.name} has no place for the table, which is one {BEGIN} and below it one {END}:\n")
        print_line(content)
        return
    files.atomic_write_text(README, replace_table(readme, content))
    print_path("Table", README)


def show(measured: Sequence[Mapping[str, Any]]) -> None:
    """The rows that are finished, in the terminal."""
    if not measured:
        return
    first = measured[0]
    title = f"{first['experiment']}: {first['dataset']}, {first['test_tasks']} test tasks a seed"
    header = ["order", "test accuracy", "non-transductive", "seeds", "published", "minutes a seed"]
    lines = []
    for row in measured:
        reported = row["published"]
        lines.append(
            [
                row["order"],
                format_interval(row["accuracy"]),
                format_interval(row["nontransductive"]),
                " ".join(map(str, row["seeds"])),
                "-" if reported is None else f"{reported['accuracy']:.2%} ({reported['source']})",
                f"{row['minutes']:.1f}",
            ]
        )
    print_table(title, header, lines)


def show_unfinished(every: Sequence[Job], reasons: Mapping[Path, str]) -> None:
    """What is left to do, and the command that does it."""
    left = [job for job in every if not (job.folder / "metrics.json").exists()]
    for job in left:
        if reason := reasons.get(job.folder):
            print_line(f"{job.folder.name} failed: {reason}")
        elif states := state_paths(job.folder):
            print_line(f"{job.folder.name}: {_iteration(states[0])} of {job.config.outer.iterations} meta-steps")
    print_line(f"{len(every) - len(left)} of {len(every)} runs are finished. The same command goes on from here:")
    print_line(f"  {shlex.join(['python', *sys.argv])}")


def _iteration(state: Path) -> int:
    return int(state.stem.rpartition("-")[2])
