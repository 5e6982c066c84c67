"""Predicted images side by side, as the network sees them, each with its predicted class below."""

from __future__ import annotations

import io
import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from metalearn.commands.adapt.predictions import Predictions
from metalearn.core import serialization as files

_CELL, _GAP, _TEXT, _TOP = 84, 10, 18, 26
_RIGHT, _WRONG, _UNKNOWN = (0, 158, 115), (213, 94, 0), (119, 119, 119)  # as in training's pictures of tasks
_MOST = 64
_COLUMNS = 8


def write_picture(predictions: Predictions, images: Tensor, path: Path) -> None:
    """At most 64 of the images, evenly spread over all of them, as a PNG file.

    A frame is green if the prediction is right and vermilion if it is wrong; grey where that is not known.

    Args:
        predictions: of these images.
        images: ``[Q, 1 or 3, height, width]`` uint8.
        path: the file.
    """
    count = len(images)
    chosen = list(range(count)) if count <= _MOST else [i * count // _MOST for i in range(_MOST)]
    columns = min(len(chosen), _COLUMNS)
    width, height = _CELL + _GAP, _CELL + _TEXT + _GAP
    sheet = Image.new(
        "RGB", (max(columns * width + _GAP, 330), _TOP + math.ceil(len(chosen) / columns) * height), "white"
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    draw.text((_GAP, 6), _title(predictions, len(chosen)), fill="black", font=font)
    right, predicted = predictions.right, predictions.predicted
    for place, i in enumerate(chosen):
        left, top = _GAP + place % columns * width, _TOP + place // columns * height
        sheet.paste(_cell(images[i]), (left, top))
        colour = _UNKNOWN if right is None else _RIGHT if right[i] else _WRONG
        draw.rectangle((left, top, left + _CELL - 1, top + _CELL - 1), outline=colour, width=3)
        label = _fitting(predictions.classes[predicted[i]], draw, font)
        draw.text((left, top + _CELL + 2), label, fill=colour, font=font)
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    files.atomic_write_bytes(path, buffer.getvalue())


def _title(predictions: Predictions, drawn: int) -> str:
    count, right = len(predictions.names), predictions.right
    text = f"{count} images" if drawn == count else f"{drawn} of {count} images"
    return text if right is None else f"{text}; {sum(right)} of all {count} predicted right (green)"


def _fitting(text: str, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """As much of a text as a cell is wide, on one line."""
    line = " ".join(text.split())
    if draw.textlength(line, font=font) <= _CELL:
        return line
    while line and draw.textlength(f"{line}…", font=font) > _CELL:
        line = line[:-1]
    return f"{line}…"


def _cell(image: Tensor) -> Image.Image:
    pixels = image.cpu().expand(3, -1, -1).permute(1, 2, 0).numpy()
    return Image.fromarray(pixels).resize((_CELL, _CELL), Image.Resampling.NEAREST)
