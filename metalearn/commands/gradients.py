"""``metalearn gradients``: run the lessons on second-order gradients, print each, and save all numbers and plots."""

from __future__ import annotations

import inspect
import io
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
from rich.padding import Padding
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from metalearn.commands.shell import tensorboard
from metalearn.config.commands_schema import GradientsConfig
from metalearn.core import serialization as files
from metalearn.core.profiling.hardware import describe_hardware, one_thread
from metalearn.core.text import wrap
from metalearn.lessons import LESSONS, Check, Lesson
from metalearn.training.tracking.console import print_line, print_path, print_table, progress_bar
from metalearn.training.tracking.tensorboard import EventWriter

DPI = 120

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LessonResult:
    """The result of running a lesson: ``None`` and the exception's text if it raised.

    Args:
        seconds: time to run it and render its plots.
        images: rendered plots ``[height, width, 3]`` by name.
    """

    name: str
    seconds: float
    lesson: Lesson | None = None
    images: dict[str, NDArray[np.uint8]] = field(default_factory=dict)
    error: str | None = None

    @property
    def passed(self) -> bool:
        """True if the lesson ran and all its checks passed."""
        return self.lesson is not None and self.lesson.passed

    @property
    def files(self) -> dict[str, str]:
        """File name of each image."""
        return {plot: f"{self.name}-{plot}.png" for plot in self.images}


def run_lessons(config: GradientsConfig, output_dir: Path) -> bool:
    """Run one lesson or all; write plots, events and ``lessons.json``; return True if every check passed."""
    names = list(LESSONS) if config.lesson == "all" else [config.lesson]
    results: list[LessonResult] = []
    with one_thread(), closing(LessonLogger(output_dir)) as logger, progress_bar() as progress:
        bar = progress.add_task("lessons", total=len(names), note="")
        for name in names:
            progress.update(bar, note=name)
            result = run_lesson(name)
            results.append(result)
            save_lesson(result, output_dir, logger)
            content = to_json(results, complete=len(results) == len(names))
            files.atomic_write_json(output_dir / "lessons.json", content, allow_nan=False)
            print_lesson(result, output_dir)
            progress.advance(bar)
        progress.update(bar, note="")
    print_summary(results, output_dir)
    return all(result.passed for result in results)


def run_lesson(name: str) -> LessonResult:
    """Run a lesson and render its plots; the random seed is reset, so that lessons do not depend on each other."""
    started = time.perf_counter()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            lesson = LESSONS[name]()
        images = {plot: render(figure) for plot, figure in lesson.plots.items()}
    except Exception as error:  # reported as a failed lesson; the others continue
        log.exception("The lesson %s raised.", name)
        return LessonResult(name, time.perf_counter() - started, error=f"{type(error).__name__}: {error}")
    return LessonResult(name, time.perf_counter() - started, lesson, images)


def render(figure: Figure) -> NDArray[np.uint8]:
    """Return a figure's pixels ``[height, width, 3]``, without pyplot, which would keep the figure in a global list."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=DPI)
    return np.asarray(Image.open(png).convert("RGB"))


def save_lesson(result: LessonResult, output_dir: Path, logger: LessonLogger) -> None:
    """Write a lesson's images and TensorBoard events."""
    for plot, file in result.files.items():
        Image.fromarray(result.images[plot]).save(output_dir / file)
    if result.lesson is not None:
        logger.log_lesson(result.name, result.lesson, result.images, seconds=result.seconds)


def to_json(results: list[LessonResult], *, complete: bool) -> dict[str, Any]:
    """Return the content of ``lessons.json``: every check of every lesson, and whether all lessons were run."""
    lessons = [
        {
            "name": result.name,
            "title": result.lesson.title if result.lesson else None,
            "claim": result.lesson.claim if result.lesson else None,
            "code": result.lesson.code if result.lesson else None,
            "right": result.passed,
            "seconds": round(result.seconds, 3),
            "error": result.error,
            "checks": [_check_entry(check) for check in result.lesson.checks] if result.lesson else [],
            "notes": result.lesson.notes if result.lesson else [],
            "figures": list(result.files.values()),
        }
        for result in results
    ]
    machine = describe_hardware(torch.device("cpu"))
    right = all(result.passed for result in results)
    return {"right": right, "complete": complete, "machine": machine, "lessons": lessons}


def _check_entry(check: Check) -> dict[str, Any]:
    computed, expected = (
        value if isinstance(value, str) or math.isfinite(value) else str(value)  # JSON has no infinity and no NaN
        for value in (check.computed, check.expected)
    )
    entry = {"what": check.name, "computed": computed, "expected": expected, "tolerance": check.tolerance}
    return {**entry, "source": check.source, "right": check.passed}


def print_lesson(result: LessonResult, output_dir: Path) -> None:
    """Print a lesson: title, claim, the code that ran, every number, the notes, and the verdict."""
    console = rich.get_console()
    console.rule(Text(result.name, style="bold"), align="left")
    lesson = result.lesson
    if lesson is None:
        console.print(Text(f"{result.name} raised {result.error}", style="bold red"))
        return
    console.print(Text(lesson.title, style="bold"), Text(lesson.claim), sep="\n\n")
    code = Syntax(fit_code(lesson.code, console.width - 4), "python", theme="ansi_dark", background_color="default")
    console.print(Padding(code, (1, 2)))
    print_path("  the whole lesson", Path(inspect.getsourcefile(LESSONS[result.name]) or result.name))
    table = Table()
    table.add_column("what", overflow="fold")
    table.add_column("computed", overflow="fold")
    table.add_column("expected", max_width=28)
    table.add_column("verdict")
    for check in lesson.checks:
        table.add_row(Text(check.name), *(Text(cell) for cell in format_check(check)), _verdict(check.passed))
    console.print(table)
    for note in lesson.notes:
        console.print(Padding(Text(f"- {note}"), (0, 2)), highlight=False)
    for file in result.files.values():
        print_path("  plot", output_dir / file)
    console.print(Text(f"{result.name}: ").append(_verdict(result.passed)))


def fit_code(code: str, width: int) -> str:
    """Break lines of code that are too long between words, indented further; a comment goes above its line."""
    lines: list[str] = []
    for line in code.splitlines():
        indent = line[: len(line) - len(line.lstrip())]
        statement, mark, comment = line.partition("  # ")
        if mark and len(line) > width:
            lines += wrap(comment, width, indent=f"{indent}# ")
            line = statement
        lines += wrap(line.strip(), width, indent=f"{indent}        ", first=indent)
    return "\n".join(lines)


def format_check(check: Check) -> tuple[str, str]:
    """Return the computed and the expected value, the latter with its tolerance and, if not analytic, its source."""
    digits = 8 if check.passed else 17  # a wrong number may differ late
    expected = _format_value(check.expected, digits)
    if check.tolerance and not isinstance(check.expected, str):
        expected += f" ± {check.tolerance:.1g}"
    if check.source != "analytic":
        expected += f" ({check.source})"
    is_rounding = check.passed and check.expected == 0 and check.tolerance > 0
    return _format_value(check.computed, 2 if is_rounding else digits), expected


def _format_value(value: float | str, digits: int) -> str:
    if isinstance(value, str):
        return value
    is_whole = math.isfinite(value) and value == round(value) and abs(value) < 1e12
    return f"{value + 0.0:,.0f}" if is_whole else f"{value:.{digits}g}"  # + 0.0: no -0


def _verdict(passed: bool) -> Text:
    return Text("right", style="green") if passed else Text("WRONG", style="bold red")


def print_summary(results: list[LessonResult], output_dir: Path) -> None:
    """Print a row for each lesson, the errors, and the output folder."""
    rows = []
    for result in results:
        checks = result.lesson.checks if result.lesson else []
        verdict = "raised" if result.lesson is None else _verdict(result.passed).plain
        rows.append([result.name, f"{sum(c.passed for c in checks)} / {len(checks)}", f"{result.seconds:.1f}", verdict])
    print_table("Lessons", ["lesson", "checks right / all", "seconds", "verdict"], rows)
    console = rich.get_console()
    for result in results:
        if result.error:
            console.print(Text(f"{result.name} raised {result.error}", style="bold red"))
    print_path("Written to", output_dir / "lessons.json")
    print_line(f"TensorBoard:\n  {tensorboard(output_dir)}")


class LessonLogger(EventWriter):
    """Writes the event file of the lessons."""

    def log_lesson(self, name: str, lesson: Lesson, pictures: dict[str, NDArray[np.uint8]], *, seconds: float) -> None:
        """Log claim, code and pictures, and every number with its expected value as scalars at step 0."""
        self.log_text(name, f"{lesson.claim}\n\n```python\n{lesson.code}\n```")
        self.log_scalars({f"{name}/seconds": seconds})
        for check in lesson.checks:
            if not (isinstance(check.computed, str) or isinstance(check.expected, str)):
                self.log_scalars(
                    {f"{name}/{check.name}": check.computed, f"{name}/{check.name} (expected)": check.expected}
                )
        for figure, picture in pictures.items():
            self.log_image(f"{name}/{figure}", picture)
        self.flush()
