"""Reproduce a row of the table: train its unfinished runs within a time limit, and gather the results."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from metalearn.commands.compare.launch import launch
from metalearn.commands.compare.variants import Job, replace_in
from metalearn.commands.reproduce.plan import TableRow, build_rows, resolve_row
from metalearn.commands.reproduce.table import (
    FILE,
    ROTATED,
    cells,
    check_enough_seeds,
    read_metrics,
    read_rotated,
    row_results,
    upsert_row,
)
from metalearn.commands.shell import invocation
from metalearn.config.commands_schema import ReproduceConfig
from metalearn.config.options import OmniglotConfig
from metalearn.core.errors import RunError
from metalearn.core.quoting import quote_command
from metalearn.core.text import plural
from metalearn.training.checkpoints import state_paths
from metalearn.training.evaluate_run import evaluate_run
from metalearn.training.run_folder import folder_lock
from metalearn.training.runtime.signals import signals_as_exceptions
from metalearn.training.tracking.console import print_line, print_path, print_table, progress_bar

log = logging.getLogger(__name__)

FINISHED, FAILED, UNFINISHED = 0, 1, 75
"""Exit codes; the last is ``EX_TEMPFAIL`` of ``sysexits.h``: try again."""

REFERENCE = Path("outputs/reference") / FILE
"""The file that ``update_reference=true`` updates, below the current directory: a checkout."""


class TimeLimitReached(BaseException):
    """The time limit has passed; no ``Exception``, so that it is not taken for the failure of a run."""


def run_reproduction(config: ReproduceConfig, folder: Path) -> int:
    """Train the unfinished runs within the time limit, gather finished orders, and return the exit code.

    Raises:
        RunError: if a run's folder holds another configuration's, another process is at work on the row, or the row
            is recorded with more seeds than are requested.
        ConfigError: if the experiment names code of the user's that is not there.
    """
    rows = [resolve_row(row) for row in build_rows(config, folder)]
    every = [job for row in rows for job in row.jobs]
    reasons: dict[Path, str] = {}
    with folder_lock(folder / config.experiment_name, wait=False), signals_as_exceptions():
        for row in rows:
            for path in output_files(folder, record=config.update_reference):
                check_enough_seeds(path, row.experiment, row.order, row.seeds)
        print_path("Row folder", folder / config.experiment_name)
        try:
            with time_limit(config.time_limit_minutes):
                reasons |= train_missing(every, config.jobs)
                reasons |= evaluate_rotated(every)
        except TimeLimitReached:
            print_line(f"The time limit is reached (time_limit_minutes={config.time_limit_minutes:g}).")
        except (KeyboardInterrupt, SystemExit):
            print_unfinished(every, {})
            raise
        results = [found for row in rows if (found := collect_row(row)) is not None]
        for found in results:
            save_row(found, folder, record=config.update_reference)
    if results:
        print_rows(results)
    if len(results) == len(rows) and not any(lacks_rotated(job) for job in every):
        return FINISHED
    print_unfinished(every, reasons)
    return FAILED if reasons else UNFINISHED


def output_files(folder: Path, *, record: bool) -> list[Path]:
    """Return the files that a row is written into."""
    return [folder / FILE, *([REFERENCE] if record else [])]


def train_missing(every: Sequence[Job], at_a_time: int) -> Mapping[Path, str]:
    """Train the runs that are not finished; return why some failed, by folder."""
    left = [job for job in every if read_metrics(job) is None]
    if done := len(every) - len(left):
        log.info("%d of %s finished already", done, plural(len(every), "run is", "runs are"))
    if not left:
        return {}
    with progress_bar() as progress:
        return launch(left, at_a_time=min(at_a_time, len(left)), progress=progress)


def lacks_rotated(job: Job) -> bool:
    """Return whether a run on Omniglot is finished, and not yet tested with rotated test classes."""
    data = job.config.data
    is_asked = isinstance(data, OmniglotConfig) and not data.rotate_test
    return is_asked and read_metrics(job) is not None and read_rotated(job) is None


def evaluate_rotated(every: Sequence[Job]) -> Mapping[Path, str]:
    """Test the finished runs once more, with test classes rotated as training classes are; return why some failed."""
    reasons = {}
    for job in filter(lacks_rotated, every):
        log.info("%s: testing with rotated test classes", job.folder.name)
        try:
            evaluate_run(replace_in(job.config, "data", rotate_test=True), job.folder, job.folder / ROTATED)
        except RunError as error:
            reasons[job.folder] = f"no test with rotated test classes: {error}"
    return reasons


@contextmanager
def time_limit(minutes: float | None) -> Iterator[None]:
    """Raise ``TimeLimitReached`` in the block after so many minutes; never if ``None``."""
    if minutes is None:
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        raise TimeLimitReached

    before = signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def collect_row(row: TableRow) -> dict[str, Any] | None:
    """Return the row's results; ``None`` while a run of it is not finished."""
    metrics = [found for job in row.jobs if (found := read_metrics(job)) is not None]
    if len(metrics) < len(row.jobs):
        return None
    return row_results(row, metrics)


def save_row(row: Mapping[str, Any], folder: Path, *, record: bool) -> None:
    """Write a row into the folder of its runs and, to record it, into the reference results."""
    with folder_lock(folder, wait=True):  # the reproduction of another row may write at this moment
        for path in output_files(folder, record=record):
            upsert_row(path, row)
            print_path("Results", path)
        if record:
            print_line("The README and the documentation show it after: python -m docs.blocks")


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the finished rows next to the published accuracies."""
    title = f"{rows[0]['experiment']}: {rows[0]['dataset']}, {rows[0]['test_tasks']} test tasks a seed"
    header = ["", *(f"{row['order']} order" for row in rows)]
    columns = [cells(row) for row in rows]
    print_table(title, header, [[name, *(column[name] for column in columns)] for name in columns[0]])


def print_unfinished(every: Sequence[Job], reasons: Mapping[Path, str]) -> None:
    """Print which runs are left, how far they are, and the command that resumes them."""
    left = [job for job in every if not (job.folder / "metrics.json").exists() or lacks_rotated(job)]
    for job in left:
        if reason := reasons.get(job.folder):
            print_line(f"{job.folder.name} failed: {reason}")
        elif states := state_paths(job.folder):
            iteration = int(states[0].stem.rpartition("-")[2])
            print_line(f"{job.folder.name}: {iteration} of {job.config.outer.iterations} meta-steps")
    print_line(
        f"{len(every) - len(left)} of {plural(len(every), 'run is', 'runs are')} finished. "
        "The same command resumes here:"
    )
    print_line(f"  {quote_command([*invocation('reproduce'), *sys.argv[1:]])}")
