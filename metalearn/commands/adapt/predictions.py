"""Predictions of a user's images: a table, a picture, a CSV file that is safe in a spreadsheet, and their accuracy."""

from __future__ import annotations

import csv
import io
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from metalearn.core import serialization as files
from metalearn.core.text import plural
from metalearn.training.tracking.console import print_table

_CELL, _GAP, _TEXT, _TOP = 84, 10, 18, 26  # pixels
_SUPPORT = (0, 114, 178)
_CORRECT, _WRONG, _UNKNOWN = (0, 158, 115), (213, 94, 0), (119, 119, 119)  # as in training's pictures of tasks
_MAX_IMAGES = 64
_COLUMNS = 8


def write_picture(
    predictions: Predictions,
    images: Tensor,
    path: Path,
    *,
    learned_from: tuple[Tensor, Sequence[str]] | None = None,
) -> None:
    """Write the support images, and below them the predicted ones, as a PNG file.

    A frame is green if the prediction is correct, vermilion if it is wrong, and grey if that is unknown.

    Args:
        predictions: of the images.
        images: predicted ``[Q, 1 or 3, height, width]``; at most 64 are drawn, evenly spread over all of them.
        path: of the file.
        learned_from: support images and the class of each; as many are drawn as fit into two rows.
    """
    correct, predicted, count = predictions.correct, predictions.predicted, len(images)
    grids = []
    if learned_from is not None:
        support, labels = learned_from
        chosen = _spread(len(support), 2 * _COLUMNS)
        title = f"adapted to {_how_many(chosen, len(support))}"
        grids.append(_Grid(title, support[chosen], [(printable_name(labels[i]), _SUPPORT) for i in chosen]))
    chosen = _spread(count, _MAX_IMAGES)
    title = f"predicted {_how_many(chosen, count)}"
    if correct is not None:
        title += f"; {sum(correct)} of all {count} correctly (green)"
    colours = [_UNKNOWN if correct is None else _CORRECT if correct[i] else _WRONG for i in chosen]
    names = [predictions.classes[predicted[i]] for i in chosen]
    grids.append(_Grid(title, images[chosen], list(zip(names, colours, strict=True))))

    columns = min(max(len(grid.cells) for grid in grids), _COLUMNS)
    width = max(columns * (_CELL + _GAP) + _GAP, 330)
    sheet = Image.new("RGB", (width, sum(grid.height(columns) for grid in grids)), "white")
    top = 0
    for grid in grids:
        grid.draw(sheet, top, columns)
        top += grid.height(columns)
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    files.atomic_write_bytes(path, buffer.getvalue())


def _spread(count: int, most: int) -> list[int]:
    """Return the positions of at most so many of ``count`` images, evenly spread."""
    return list(range(count)) if count <= most else [i * count // most for i in range(most)]


def _how_many(chosen: Sequence[int], count: int) -> str:
    images = plural(count, "image")
    return images if len(chosen) == count else f"{images} ({len(chosen)} are shown)"


@dataclass(frozen=True, eq=False)
class _Grid:
    """Images ``[cells, channels, height, width]`` in rows below a title, each with its text and colour."""

    title: str
    images: Tensor
    cells: Sequence[tuple[str, tuple[int, int, int]]]

    def height(self, columns: int) -> int:
        """Return the height in pixels."""
        return _TOP + math.ceil(len(self.cells) / columns) * (_CELL + _TEXT + _GAP)

    def draw(self, sheet: Image.Image, top: int, columns: int) -> None:
        """Draw title and images from ``top`` on."""
        draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
        draw.text((_GAP, top + 6), self.title, fill="black", font=font)
        for position, (image, (text, colour)) in enumerate(zip(self.images, self.cells, strict=True)):
            row, column = divmod(position, columns)
            x, y = _GAP + column * (_CELL + _GAP), top + _TOP + row * (_CELL + _TEXT + _GAP)
            pixels = image.cpu().expand(3, -1, -1).permute(1, 2, 0).numpy()
            sheet.paste(Image.fromarray(pixels).resize((_CELL, _CELL), Image.Resampling.NEAREST), (x, y))
            draw.rectangle((x, y, x + _CELL - 1, y + _CELL - 1), outline=colour, width=3)
            draw.text((x, y + _CELL + 2), _truncate(text, draw, font), fill=colour, font=font)


def _truncate(text: str, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Cut a text to one line of a cell's width."""
    line = " ".join(text.split())
    if draw.textlength(line, font=font) <= _CELL:
        return line
    while line and draw.textlength(f"{line}…", font=font) > _CELL:
        line = line[:-1]
    return f"{line}…"


_MAX_ROWS = 30
_Z = 1.96  # normal quantile of a 95% interval


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predictions for Q images: file names, probabilities ``[Q, N]``, N class names, and true positions if known."""

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
    def correct(self) -> list[bool] | None:
        """True for each image whose prediction is correct; ``None`` if the true classes are unknown."""
        return None if self.truth is None else [p == t for p, t in zip(self.predicted, self.truth, strict=True)]

    def rows(self) -> list[tuple[str, str, float, str]]:
        """Return file, predicted class, its probability, and true class (empty if unknown) of each image."""
        best = self.probabilities.amax(dim=-1).tolist()
        predicted = [self.classes[p] for p in self.predicted]
        true = [""] * len(self.names) if self.truth is None else [self.classes[t] for t in self.truth]
        return list(zip(self.names, predicted, best, true, strict=True))


def printable_name(name: str | Path) -> str:
    """Return a file's name, which need not be UTF-8, as text that can be printed and written."""
    return os.fsencode(name).decode("utf-8", "replace")


def wilson_interval(correct: int, count: int) -> tuple[float, float]:
    """Return Wilson's 95% score interval of a fraction; also valid for small counts and for all or none correct.

        (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    Reference: Wilson 1927, doi 10.1080/01621459.1927.10502953.

    Examples:
        >>> low, high = wilson_interval(8, 10)
        >>> f"{low:.3f} {high:.3f}"
        '0.490 0.943'
    """
    fraction, z2 = correct / count, _Z * _Z
    centre = fraction + z2 / (2 * count)
    half = _Z * math.sqrt(fraction * (1 - fraction) / count + z2 / (4 * count * count))
    scale = 1 + z2 / count
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def format_accuracy(correct: Sequence[bool]) -> str:
    """Return the accuracy with its interval as text."""
    low, high = wilson_interval(sum(correct), len(correct))
    return f"{sum(correct) / len(correct):.1%} ({sum(correct)} of {len(correct)}; 95% interval {low:.1%} to {high:.1%})"


def print_predictions(predictions: Predictions) -> None:
    """Print the first rows as a table, and how many more there are."""
    rows = predictions.rows()
    known = predictions.truth is not None
    more = f" (the first {_MAX_ROWS}; {len(rows) - _MAX_ROWS} more are in predictions.csv)"
    print_table(
        f"Predictions{more if len(rows) > _MAX_ROWS else ''}",
        ["file", "predicted", "probability", *(["true"] if known else [])],
        [
            [name, one, f"{probability:.3f}", *([true] if known else [])]
            for name, one, probability, true in rows[:_MAX_ROWS]
        ],
    )


def write_csv(predictions: Predictions, path: Path) -> None:
    """Write all rows as UTF-8: file, predicted, probability, true (empty if unknown), and each class's probability.

    A name that a spreadsheet would evaluate as a formula is prefixed with '.
    """
    header = ["file", "predicted", "probability", "true", *(f"p({name})" for name in predictions.classes)]
    rows = [_format_row(map(_escape_csv_formulas, header))]
    for (name, one, probability, true), row in zip(predictions.rows(), predictions.probabilities.tolist(), strict=True):
        file, predicted, label = map(_escape_csv_formulas, (name, one, true))
        rows.append(_format_row([file, predicted, f"{probability:.6f}", label, *(f"{p:.6f}" for p in row)]))
    files.atomic_write_text(path, "".join(rows))


def _format_row(cells: Iterable[str]) -> str:
    """Format a line of a CSV file, in which a cell with a line break of any kind is quoted."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\r\n").writerow(cells)  # which has both breaks quoted
    return text.getvalue()[:-2] + "\n"


_FORMULA_SIGNS = "=+-@\N{MINUS SIGN}"
_BLANK_LETTERS = "\N{HANGUL CHOSEONG FILLER}\N{HANGUL JUNGSEONG FILLER}\N{BRAILLE PATTERN BLANK}"


def _escape_csv_formulas(text: str) -> str:
    """Put ' before what a spreadsheet would evaluate, and before a tab or a line break at the beginning.

    Where the separator is a semicolon or a tab (Excel in many languages), a cell begins after these too, and quotation
    marks do not hold it together with the line breaks in it.
    """
    cells = re.split(r"([;\t\r\n])", text)
    escaped = "".join(f"'{cell}" if _is_formula(cell) else cell for cell in cells)
    return f"'{escaped}" if escaped.startswith(("\t", "\r", "\n")) else escaped


def _is_formula(cell: str) -> bool:
    """Return whether the first character that is not blank is a formula's sign, of any width."""
    for character in cell:
        plain = unicodedata.normalize("NFKD", character)[:1]
        if plain in _FORMULA_SIGNS:
            return True
        if unicodedata.category(plain)[0] not in "ZCM" and plain not in _BLANK_LETTERS:
            return False
    return False
