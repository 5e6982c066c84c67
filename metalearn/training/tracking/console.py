"""Terminal output: progress bars with an ETA, and tables."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import rich
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table


def progress_bar(*, visible: bool = True) -> Progress:
    """Return a progress bar with counts, ETA, and the text of its tasks' ``note`` field."""
    return Progress(
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
    """Print two columns of names and values."""
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    rich.get_console().print(table)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under a header; every column but the first holds numbers."""
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left", overflow="fold", min_width=6 if i else None)
    for row in rows:
        table.add_row(*row)
    rich.get_console().print(table)


def print_path(what: str, path: Path) -> None:
    """Print where something was written, on one line that can be copied."""
    rich.get_console().print(f"{what}: {path}", soft_wrap=True, highlight=False, markup=False)


def print_line(text: str) -> None:
    """Print a sentence without highlighting or markup."""
    rich.get_console().print(text, soft_wrap=not sys.stdout.isatty(), highlight=False, markup=False)
