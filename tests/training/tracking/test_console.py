"""Tables and log records on a narrow terminal; progress where the output is no terminal."""

from __future__ import annotations

import logging

import pytest
import rich
from rich.console import Console

from metalearn.training.tracking.console import ConsoleHandler, print_table, progress_bar


def test_table_gives_up_blanks_before_it_breaks_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(width=80, record=True)
    monkeypatch.setattr(rich, "get_console", lambda: console)
    print_table("Errors", ["model, order, K", *"abcdefg"], [["attention 1st 1", *["raised"] * 7]])
    lines = console.export_text().splitlines()
    assert sum("attention 1st 1" in line for line in lines) == 1
    assert max(map(len, lines)) <= 80


def test_record_is_one_line_of_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    path = "/a/" + "x" * 100
    handler = ConsoleHandler()
    handler.emit(logging.LogRecord("x", logging.INFO, "", 1, "%s: [b]this", (path,), None))
    assert capsys.readouterr().out == f"{path}: [b]this\n"


def test_progress_prints_lines_into_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    clock = [0.0]
    bar = progress_bar()
    bar.get_time = lambda: clock[0]  # seconds, set by hand
    with bar:
        task = bar.add_task("meta-training", total=100, note="")
        for clock[0], step in ((1.0, 1), (5.0, 10), (9.0, 15), (11.0, 20), (1000.0, 50), (1019.0, 51), (1021.0, 52)):
            bar.update(task, completed=step, note="validation 60.0%" if step > 10 else "")
        printed = capsys.readouterr().out.splitlines()
    note = "  validation 60.0%"
    steps = [f"meta-training {step}/100{note if step > 10 else ''}" for step in (10, 20, 50, 52)]
    assert [line for line in printed if "━" not in line] == steps, "5 s apart, later 2% of the time"
