"""Predictions of a user's images: as a table, as CSV that a spreadsheet may open, and how many are right."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape
from torch import Tensor

from metalearn.core import serialization as files
from metalearn.training.tracking.console import print_table

_SHOWN = 30
_Z = 1.96  # of a 95% interval


@dataclass(frozen=True, eq=False)
class Predictions:
    """What was predicted for Q images.

    Args:
        names: of the files, as they are shown.
        probabilities: ``[Q, N]``.
        classes: N names, as they are shown.
        truth: positions of the true classes; ``None`` where they are not known.
    """

    names: list[str]
    probabilities: Tensor
    classes: list[str]
    truth: list[int] | None

    @property
    def predicted(self) -> list[int]:
        """Positions of the most probable classes."""
        positions: list[int] = self.probabilities.argmax(dim=-1).tolist()
        return positions

    @property
    def right(self) -> list[bool] | None:
        """Of each image, whether it was predicted right; ``None`` where that is not known."""
        return None if self.truth is None else [p == t for p, t in zip(self.predicted, self.truth, strict=True)]

    def rows(self) -> list[tuple[str, str, float, str]]:
        """File, predicted class, its probability, and the true class, which may be empty."""
        best = self.probabilities.amax(dim=-1).tolist()
        predicted = [self.classes[p] for p in self.predicted]
        true = [""] * len(self.names) if self.truth is None else [self.classes[t] for t in self.truth]
        return list(zip(self.names, predicted, best, true, strict=True))


def printable_name(name: str | Path) -> str:
    """A file's name, which need not be UTF-8, as text that can be printed and written."""
    return os.fsencode(name).decode("utf-8", "replace")


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """The 95% interval of a share, by Wilson's score, which also holds for few and for all or none right.

        (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    Reference: Wilson 1927, doi 10.1080/01621459.1927.10502953.

    Example:
        >>> low, high = interval(8, 10)
        >>> f"{low:.3f} {high:.3f}"
        '0.490 0.943'
    """
    share, z2 = right / count, _Z * _Z
    centre = share + z2 / (2 * count)
    half = _Z * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    scale = 1 + z2 / count
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def accuracy_text(right: Sequence[bool]) -> str:
    """Share of right predictions with its interval."""
    low, high = wilson_interval(sum(right), len(right))
    return f"{sum(right) / len(right):.1%} ({sum(right)} of {len(right)}; 95% interval {low:.1%} to {high:.1%})"


def print_predictions(predictions: Predictions) -> None:
    """The first rows as a table, and how many more there are."""
    rows = predictions.rows()
    known = predictions.truth is not None
    print_table(
        f"Predictions (the first {_SHOWN}; {len(rows) - _SHOWN} more are in predictions.csv)"
        if len(rows) > _SHOWN
        else "Predictions",
        ["file", "predicted", "probability", *(["true"] if known else [])],
        [
            [escape(name), escape(one), f"{probability:.3f}", *([escape(true)] if known else [])]
            for name, one, probability, true in rows[:_SHOWN]
        ],
    )


def write_csv(predictions: Predictions, path: Path) -> None:
    """All rows as UTF-8: file, predicted, probability, true (empty if not known), and each class's probability.

    A name that a spreadsheet would take for a formula (it begins with =, +, -, @, a tab or a line break) has a ' before
    it.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "predicted", "probability", "true", *(f"p({name})" for name in predictions.classes)])
    for (name, one, probability, true), row in zip(predictions.rows(), predictions.probabilities.tolist(), strict=True):
        writer.writerow(
            [
                _escape_csv_formula(name),
                _escape_csv_formula(one),
                f"{probability:.6f}",
                _escape_csv_formula(true),
                *map(_six, row),
            ]
        )
    files.atomic_write_text(path, text.getvalue())


def _escape_csv_formula(text: str) -> str:
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else text


def _six(p: float) -> str:
    return f"{p:.6f}"
