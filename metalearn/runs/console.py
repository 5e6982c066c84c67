"""What a run shows in the terminal: a progress bar with an ETA, and a table at the end."""

from __future__ import annotations

from collections.abc import Mapping

import rich
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table


def progress_bar() -> Progress:
    """A bar with counts, the time that is left, and a note of its tasks' ``note`` field."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=rich.get_console(),
    )


def print_table(title: str, rows: Mapping[str, str]) -> None:
    """Two columns of names and values."""
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in rows.items():
        table.add_row(name, value)
    rich.get_console().print(table)
