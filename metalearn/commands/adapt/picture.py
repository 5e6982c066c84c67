"""Draw the predicted images in a grid, as the network sees them, each above its predicted class."""

from __future__ import annotations

import io
import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from metalearn.commands.adapt.predictions import Predictions
from metalearn.core import serialization as files

_CELL, _GAP, _TEXT, _TOP = 84, 10, 18, 26  # pixels
_CORRECT, _WRONG, _UNKNOWN = (0, 158, 115), (213, 94, 0), (119, 119, 119)  # as in training's pictures of tasks
_MAX_IMAGES = 64
_COLUMNS = 8


def write_picture(predictions: Predictions, images: Tensor, path: Path) -> None:
    """Write at most 64 of the images, evenly spread over all of them, as a PNG file.

    A frame is green if the prediction is correct, vermilion if it is wrong, and grey if that is unknown.

    Args:
        predictions: of these images.
        images: ``[Q, 1 or 3, height, width]`` uint8.
        path: the file.
    """
    count = len(images)
    chosen = list(range(count)) if count <= _MAX_IMAGES else [i * count // _MAX_IMAGES for i in range(_MAX_IMAGES)]
    columns = min(len(chosen), _COLUMNS)
    width, height = _CELL + _GAP, _CELL + _TEXT + _GAP
    size = max(columns * width + _GAP, 330), _TOP + math.ceil(len(chosen) / columns) * height
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    correct, predicted = predictions.correct, predictions.predicted

    title = f"{count} images" if len(chosen) == count else f"{len(chosen)} of {count} images"
    if correct is not None:
        title += f"; {sum(correct)} of all {count} predicted correctly (green)"
    draw.text((_GAP, 6), title, fill="black", font=font)
    for position, i in enumerate(chosen):
        left, top = _GAP + position % columns * width, _TOP + position // columns * height
        pixels = images[i].cpu().expand(3, -1, -1).permute(1, 2, 0).numpy()
        sheet.paste(Image.fromarray(pixels).resize((_CELL, _CELL), Image.Resampling.NEAREST), (left, top))
        colour = _UNKNOWN if correct is None else _CORRECT if correct[i] else _WRONG
        draw.rectangle((left, top, left + _CELL - 1, top + _CELL - 1), outline=colour, width=3)
        label = _truncate(predictions.classes[predicted[i]], draw, font)
        draw.text((left, top + _CELL + 2), label, fill=colour, font=font)
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    files.atomic_write_bytes(path, buffer.getvalue())


def _truncate(text: str, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Cut a text to one line of a cell's width."""
    line = " ".join(text.split())
    if draw.textlength(line, font=font) <= _CELL:
        return line
    while line and draw.textlength(f"{line}…", font=font) > _CELL:
        line = line[:-1]
    return f"{line}…"
