"""Tables and figures in Markdown, from the committed files of ``outputs/reference/``."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from metalearn.training.evaluation import MeanCI

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "outputs" / "reference"


@functools.cache  # a page asks for the same file again and again
def read(name: str) -> dict[str, Any]:
    """Return a file of ``outputs/reference/``."""
    content: dict[str, Any] = json.loads((REFERENCE / name).read_text(encoding="utf-8"))
    return content


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table."""
    return "\n".join([row(*head), "|---" * len(head) + "|", *(row(*cells) for cells in rows)])


def row(*cells: object) -> str:
    """Return a row of a table."""
    texts = (str(cell).replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(texts)} |"


def estimate(value: dict[str, float]) -> str:
    """Format a mean and its 95% interval, both shares."""
    return str(MeanCI(value["mean"], value["ci95"]))


def points(value: dict[str, float], digits: int) -> str:
    """Format a difference of shares and its 95% interval in points."""
    return f"{100 * value['mean']:.{digits}f} ± {100 * value['ci95']:.{digits}f}"


def accuracy(metrics: dict[str, Any], kind: str = "") -> str:
    """Format a run's test accuracy; ``kind`` is ``""`` or ``"_nontransductive"``."""
    return str(MeanCI(metrics[f"test.accuracy{kind}"], metrics[f"test.ci95{kind}"]))
