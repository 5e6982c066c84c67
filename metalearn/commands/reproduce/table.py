"""Rows on disk, and as the README's table. Needs no torch."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metalearn.commands.reproduce.published import PUBLISHED, SETTINGS, experiment_name, published
from metalearn.config.compose import compose, to_dataclass
from metalearn.config.schema import TrainConfig
from metalearn.core.errors import RunError

FILE = "omniglot.json"
"""The rows, in ``outputs/reproduction/`` and, recorded, in ``outputs/reference/``."""

BEGIN, END = "<!-- reproduction -->", "<!-- /reproduction -->"
"""Between these stands the table in the README."""

HEADER = (
    "task, `experiment_name=`",
    "order",
    "accuracy, mean of seeds ± 95%",
    "seeds",
    "non-transductive",
    "published",
    "budget, meta-steps",
    "minutes a seed",
)
NOT_MEASURED = "not measured"

Figures = Mapping[str, Any]


def read_rows(path: Path) -> list[Figures]:
    """The rows in a file; none if there is no such file.

    Raises:
        RunError: if it cannot be read.
    """
    if not path.exists():
        return []
    try:
        rows: list[Figures] = json.loads(path.read_text())["rows"]
        for row in rows:
            _cells(row)
            _place(row)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is not a file of rows: {error!r}. Move it away, or restore it.") from error
    return rows


def _key(row: Figures) -> tuple[str, str]:
    return row["experiment"], row["order"]


def refuse_fewer_seeds(path: Path, experiment: str, order: str, seeds: Sequence[int]) -> None:
    """Refuse to replace a row by one with fewer seeds.

    Raises:
        RunError: naming both.
    """
    for row in read_rows(path):
        if _key(row) == (experiment, order) and len(row["seeds"]) > len(seeds):
            raise RunError(
                f"seeds={list(seeds)}: {path} holds {experiment}, {order} order, with more seeds, {row['seeds']}, "
                "which would be lost. Ask for at least as many, or remove that row from the file."
            )


def upsert_row(path: Path, row: Figures) -> str:
    """A file's new content: its rows, with one added, or in the place of its former figures.

    Raises:
        RunError: if the former ones are of more seeds.
    """
    refuse_fewer_seeds(path, *_key(row), row["seeds"])
    rows = read_rows(path)
    kept = {_key(other): other for other in rows} | {_key(row): row}
    return json.dumps({"rows": list(kept.values())}, indent=2) + "\n"


def readme_table(rows: Sequence[Figures]) -> str:
    """All that was measured, and every published row that was not, by task, order and budget."""
    cells = {(*_place(row), row["experiment"]): _cells(row) for row in rows}
    for ways, shots in SETTINGS:
        for algorithm, order in PUBLISHED:
            name = experiment_name(ways, shots, algorithm)
            budget = _budget(name)
            if (name, order) not in map(_key, rows):
                place = (*_place({"ways": ways, "shots": shots, "order": order, "iterations": budget[0]}), name)
                cells[place] = _not_measured(name, algorithm, order, ways, shots, budget)
    lines = [HEADER, ["---"] * len(HEADER), *(cells[place] for place in sorted(cells))]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@functools.cache
def _budget(experiment: str) -> tuple[int, int]:
    """Meta-steps, and tasks in each."""
    config = to_dataclass(compose("train", [f"experiment={experiment}"]), TrainConfig)
    return config.outer.iterations, config.task.meta_batch


def _place(row: Figures) -> tuple[int, int, bool, int]:
    return row["ways"], row["shots"], row["order"] == "first", row["iterations"]


def _cells(row: Figures) -> list[str]:
    reported = row["published"]
    return [
        f"{row['ways']}-way {row['shots']}-shot, `{row['experiment']}`",
        row["order"],
        format_interval(row["accuracy"]),
        str(len(row["seeds"])),
        format_interval(row["nontransductive"]),
        "-" if reported is None else f"{round(100 * reported['accuracy'], 2):g}% ({reported['source']})",
        f"{row['iterations']:,} of {row['tasks_per_step']} tasks",
        f"{row['minutes']:.0f}",
    ]


def _not_measured(name: str, algorithm: str, order: str, ways: int, shots: int, budget: tuple[int, int]) -> list[str]:
    reported = str(published(algorithm, order, ways, shots))
    task = f"{ways}-way {shots}-shot, `{name}`"
    return [task, order, NOT_MEASURED, "-", "-", reported, f"{budget[0]:,} of {budget[1]} tasks", "-"]


def format_interval(found: Figures | None) -> str:
    """A mean with its 95% interval, and what that is over unless over seeds."""
    if found is None:
        return "-"
    return f"{found['mean']:.2%} ± {found['ci95']:.2%}" + (" (over tasks)" if found["over"] == "tasks" else "")


def between_markers(readme: str) -> str | None:
    """What stands between the markers; ``None`` unless both are there, once, and in order."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        return None
    return readme.partition(BEGIN)[2].partition(END)[0].strip()


def replace_table(readme: str, content: str) -> str:
    """A README that has both markers, with another table between them."""
    before, _, rest = readme.partition(BEGIN)
    return f"{before}{BEGIN}\n{content}\n{END}{rest.partition(END)[2]}"
