"""Terminal output: progress bars with an ETA, tables, and lines that are broken between words only."""

from __future__ import annotations

import importlib.util
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import rich
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from metalearn.core.quoting import quote_word
from metalearn.core.text import fit


class LoggedProgress(Progress):
    """A progress bar that prints a line now and then where the output is a file, which holds no moving bar.

    Lines are at least 5 s, and 2% of the time so far, apart: a training of a day prints about 350.
    """

    _started = _printed = math.inf

    def start(self) -> None:
        """Start as ``Progress`` does."""
        self._started = self._printed = self.get_time()
        super().start()

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """Update a task as ``Progress`` does."""
        super().update(task_id, **changes)
        now, task = self.get_time(), self._tasks[task_id]
        is_due = now - self._printed >= max(_LINE_EVERY_S, _LINE_EVERY_SHARE * (now - self._started))
        if is_due and not self.disable and not self.console.is_terminal:
            self._printed = now
            print_line(f"{task.description} {task.completed:.0f}/{task.total:.0f}  {task.fields['note']}".rstrip())


_LINE_EVERY_S, _LINE_EVERY_SHARE = 5.0, 0.02


def progress_bar(*, visible: bool = True) -> Progress:
    """Return a progress bar with counts, ETA, and the text of its tasks' ``note`` field."""
    return LoggedProgress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=_progress_console(),
        disable=not visible,
    )


def _progress_console() -> Console:
    """Return a console that redraws a bar.

    In a notebook rich does so by ipywidgets, and warns where that is missing; there the line is written again.
    """
    console = rich.get_console()
    lacks_widgets = console.is_jupyter and importlib.util.find_spec("ipywidgets") is None
    return Console(force_jupyter=False) if lacks_widgets else console


def print_summary(title: str, rows: Mapping[str, str]) -> None:
    """Print two columns of names and values, plain text as in ``print_table``."""
    table = Table(title=Text(title, style="table.title"), show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(Text(name), Text(value))
    rich.get_console().print(table)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str | Text]]) -> None:
    """Print rows under a header; every column but the first holds numbers.

    Text is printed as it is: names may look like markup or an emoji code, ``[b]`` or ``:ok:``; a ``Text`` has a style.
    """
    console, table = rich.get_console(), Table(title=Text(title, style="table.title"), title_justify="left")
    for i, name in enumerate(header):
        table.add_column(Text(name), justify="right" if i else "left", overflow="fold", min_width=6 if i else None)
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    table.collapse_padding = table.__rich_measure__(console, console.options.update(width=1000)).maximum > console.width
    console.print(table)


def print_path(what: str, path: Path) -> None:
    """Print where something was written, on one line, as a word that can be pasted into a shell."""
    _print_plain(f"{what}: {quote_word(path)}")


def print_line(text: str) -> None:
    """Print a sentence without highlighting or markup."""
    _print_plain(fit(text, sys.stdout))


def _print_plain(text: str) -> None:
    rich.get_console().print(text, soft_wrap=True, highlight=False, markup=False, emoji=False)


class ConsoleHandler(logging.Handler):
    """Prints log records above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        try:
            print_line(self.format(record))
        except Exception:  # as every handler of logging does
            self.handleError(record)
