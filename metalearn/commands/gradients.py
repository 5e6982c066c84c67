"""The lab: runs the lessons on second-order gradients, shows each, and keeps every number and picture.

A lesson that raises counts as wrong and is reported by name; the others' results are not lost.
"""

from __future__ import annotations

import io
import json
import logging
import math
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import rich
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from rich.markup import escape
from rich.padding import Padding
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from metalearn.config.commands_schema import GradientsConfig
from metalearn.core import serialization as files
from metalearn.core.profiling.hardware import describe_hardware
from metalearn.core.profiling.threads import one_thread
from metalearn.lessons import LESSONS, Check, Lesson
from metalearn.training.tracking.console import print_path, print_table, progress_bar
from metalearn.training.tracking.tensorboard import EventWriter

DPI = 120
"""Of the pictures."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LessonResult:
    """What came of a lesson.

    Args:
        name: as in ``LESSONS``.
        seconds: it took, with its pictures.
        lesson: its numbers, or ``None`` if it raised.
        pictures: ``[height, width, 3]``, by figure.
        error: what it raised.
    """

    name: str
    seconds: float
    lesson: Lesson | None = None
    pictures: dict[str, NDArray[np.uint8]] = field(default_factory=dict)
    error: str | None = None

    @property
    def right(self) -> bool:
        """The verdict."""
        return self.lesson is not None and self.lesson.right

    def file(self, figure: str) -> str:
        """Name of a picture's file."""
        return f"{self.name}-{figure}.png"


def run_lessons(config: GradientsConfig, output_dir: Path) -> bool:
    """Run one lesson or all; write pictures, TensorBoard and ``lessons.json``, and print a summary.

    Returns:
        Whether every number of every lesson is right.
    """
    names = list(LESSONS) if config.lesson == "all" else [config.lesson]
    outcomes: list[LessonResult] = []
    with one_thread(), closing(LessonLogger(output_dir)) as tracker, progress_bar() as progress:
        bar = progress.add_task("lessons", total=len(names), note="")
        for name in names:
            progress.update(bar, note=name)
            outcome = run_lesson(name)
            outcomes.append(outcome)
            save_lesson(outcome, output_dir, tracker)
            files.atomic_write_text(output_dir / "lessons.json", report(outcomes, complete=len(outcomes) == len(names)))
            print_lesson(outcome, output_dir)
            progress.advance(bar)
        progress.update(bar, note="")
    print_summary(outcomes, output_dir)
    return all(outcome.right for outcome in outcomes)


def run_lesson(name: str) -> LessonResult:
    """Run a lesson, with random numbers that do not depend on the lessons before it, and render its figures."""
    started = time.perf_counter()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            lesson = LESSONS[name]()
        pictures = {title: render(figure) for title, figure in lesson.plots.items()}
    except Exception as error:  # not mended but reported: the other lessons' results must not be lost with it
        log.exception("The lesson %s raised.", name)
        return LessonResult(name, time.perf_counter() - started, error=f"{type(error).__name__}: {error}")
    return LessonResult(name, time.perf_counter() - started, lesson, pictures)


def render(figure: Figure) -> NDArray[np.uint8]:
    """A figure's pixels ``[height, width, 3]``; not through pyplot, which would keep it in a global list."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=DPI)
    return np.asarray(Image.open(png).convert("RGB"))


def save_lesson(outcome: LessonResult, output_dir: Path, tracker: LessonLogger) -> None:
    """Write a lesson's pictures, and its event file."""
    for figure, pixels in outcome.pictures.items():
        Image.fromarray(pixels).save(output_dir / outcome.file(figure))
    if outcome.lesson is not None:
        tracker.log_lesson(outcome.name, outcome.lesson, outcome.pictures, seconds=outcome.seconds)


def report(outcomes: list[LessonResult], *, complete: bool = True) -> str:
    """``lessons.json``: every check of every lesson, its verdict and seconds, and whether all were run."""
    lessons = [
        {
            "name": outcome.name,
            "title": outcome.lesson.title if outcome.lesson else None,
            "right": outcome.right,
            "seconds": round(outcome.seconds, 3),
            "error": outcome.error,
            "checks": [_entry(check) for check in outcome.lesson.checks] if outcome.lesson else [],
            "notes": outcome.lesson.notes if outcome.lesson else [],
            "figures": [outcome.file(figure) for figure in outcome.pictures],
        }
        for outcome in outcomes
    ]
    content = {
        "right": all(outcome.right for outcome in outcomes),
        "complete": complete,
        "machine": describe_hardware(torch.device("cpu")),
        "lessons": lessons,
    }
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def _entry(check: Check) -> dict[str, Any]:
    return {
        "what": check.what,
        "computed": _for_json(check.computed),
        "expected": _for_json(check.expected),
        "tolerance": check.tolerance,
        "source": check.source,
        "right": check.right,
    }


def _for_json(value: float | str) -> float | str:
    """JSON knows no infinity and no NaN."""
    return value if isinstance(value, str) or math.isfinite(value) else str(value)


def print_lesson(outcome: LessonResult, output_dir: Path) -> None:
    """Print a lesson: title, claim, the code that ran, every number, the notes, and the verdict."""
    console = rich.get_console()
    console.rule(f"[bold]{outcome.name}", align="left")
    lesson = outcome.lesson
    if lesson is None:
        console.print(Text(f"{outcome.name} raised {outcome.error}", style="bold red"))
        return
    console.print(Text(lesson.title, style="bold"), Text(lesson.claim), sep="\n\n")
    code = Syntax(lesson.code, "python", theme="ansi_dark", background_color="default", word_wrap=True)
    console.print(Padding(code, (1, 2)))
    table = Table("what", "computed")
    table.add_column("expected", max_width=28)
    table.add_column("verdict")
    for check in lesson.checks:
        table.add_row(Text(check.what), *(Text(cell) for cell in _cells(check)), _verdict(check.right))
    console.print(table)
    for note in lesson.notes:
        console.print(Padding(f"- {escape(note)}", (0, 2)), highlight=False)
    for figure in outcome.pictures:
        print_path("  figure", output_dir / outcome.file(figure))
    console.print(Text(f"{outcome.name}: ").append(_verdict(outcome.right)))


def _cells(check: Check) -> tuple[str, str]:
    """What was computed, and what it must be, with the tolerance and where it comes from if that is no formula."""
    digits = 8 if check.right else 17  # a wrong number may differ late
    expected = _shown(check.expected, digits)
    if check.tolerance and not isinstance(check.expected, str):
        expected += f" ± {check.tolerance:.1g}"
    if check.source != "analytic":
        expected += f" ({check.source})"
    is_rounding = check.right and check.expected == 0 and check.tolerance > 0
    return _shown(check.computed, 2 if is_rounding else digits), expected


def _shown(value: float | str, digits: int) -> str:
    if isinstance(value, str):
        return value
    is_whole = math.isfinite(value) and value == round(value) and abs(value) < 1e12
    return f"{value + 0.0:,.0f}" if is_whole else f"{value:.{digits}g}"  # + 0.0: no -0


def _verdict(right: bool) -> Text:
    return Text("right", style="green") if right else Text("WRONG", style="bold red")


def print_summary(outcomes: list[LessonResult], output_dir: Path) -> None:
    """Print a line a lesson, and where everything lies."""
    rows = []
    for outcome in outcomes:
        checks = outcome.lesson.checks if outcome.lesson else []
        verdict = "raised" if outcome.lesson is None else "right" if outcome.right else "WRONG"
        right = sum(check.right for check in checks)
        rows.append([outcome.name, f"{right} / {len(checks)}", f"{outcome.seconds:.1f}", verdict])
    print_table("Lessons", ["lesson", "checks right / all", "seconds", "verdict"], rows)
    for outcome in outcomes:
        if outcome.error:
            rich.get_console().print(Text(f"{outcome.name} raised {outcome.error}", style="bold red"))
    print_path("Written to", output_dir / "lessons.json")
    rich.get_console().print(
        f"TensorBoard: tensorboard --logdir {output_dir}", soft_wrap=True, highlight=False, markup=False
    )


class LessonLogger(EventWriter):
    """Writes the event file of the lessons."""

    def log_lesson(self, name: str, lesson: Lesson, pictures: dict[str, NDArray[np.uint8]], *, seconds: float) -> None:
        """Log claim, code and pictures, and every number with its expected value as scalars at step 0."""
        self.log_text(name, f"{lesson.claim}\n\n```python\n{lesson.code}\n```")
        self.log_scalars({f"{name}/seconds": seconds})
        for check in lesson.checks:
            if not (isinstance(check.computed, str) or isinstance(check.expected, str)):
                self.log_scalars(
                    {f"{name}/{check.what}": check.computed, f"{name}/{check.what} (expected)": check.expected}
                )
        for figure, picture in pictures.items():
            self.log_image(f"{name}/{figure}", picture)
        self.flush()
