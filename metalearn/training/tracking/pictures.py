"""Tasks as a picture: a row a class, its support images, then its queries with what was predicted for them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from metalearn.core.types import Episodes

_CELL, _GAP, _LEFT, _TOP = 56, 6, 34, 22
_RIGHT_COLOUR, _WRONG_COLOUR = (0, 158, 115), (213, 94, 0)  # Okabe and Ito's green and vermilion, for every eye
_MOST_ROWS, _MOST_QUERIES = 20, 8


def draw_tasks(episodes: Episodes, predictions: Tensor) -> NDArray[np.uint8]:
    """A batch of tasks side by side, ``[height, width, 3]`` uint8.

    A query's frame is green if it was predicted right; otherwise vermilion, with the wrong label on it.

    Args:
        episodes: images in [0, 1], ``[T, examples, 1 or 3, height, width]``, labels 0 to N - 1.
        predictions: logits of the queries, ``[T, Q, N]``.
    """
    return np.hstack([_task(one, p) for one, p in zip(episodes.split(1), predictions.split(1), strict=True)])


def _task(episodes: Episodes, predictions: Tensor) -> NDArray[np.uint8]:
    support, query = episodes.support_x[0].cpu(), episodes.query_x[0].cpu()
    support_y, query_y = episodes.support_y[0].tolist(), episodes.query_y[0].tolist()
    predicted = predictions[0].argmax(dim=-1).tolist()
    ways = min(predictions.shape[-1], _MOST_ROWS)
    shots = max(support_y.count(label) for label in range(ways))
    queries = min(max(query_y.count(label) for label in range(ways)), _MOST_QUERIES)
    pitch = _CELL + _GAP
    split = _LEFT + shots * pitch + 2 * _GAP
    sheet = Image.new("RGB", (max(split + queries * pitch, 230), _TOP + ways * pitch), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    draw.text((_LEFT, 4), "support", fill="black", font=font)
    right = sum(p == y for p, y in zip(predicted, query_y, strict=True))
    draw.text((split, 4), f"queries: {right} of {len(query_y)} right", fill="black", font=font)
    for label in range(ways):
        top = _TOP + label * pitch
        draw.text((8, top + _CELL // 2 - 8), str(label), fill="black", font=font)
        for column, i in enumerate(i for i, y in enumerate(support_y) if y == label):
            sheet.paste(_cell(support[i]), (_LEFT + column * pitch, top))
        for column, i in enumerate([i for i, y in enumerate(query_y) if y == label][:queries]):
            left = split + column * pitch
            sheet.paste(_cell(query[i]), (left, top))
            colour = _RIGHT_COLOUR if predicted[i] == label else _WRONG_COLOUR
            draw.rectangle((left, top, left + _CELL - 1, top + _CELL - 1), outline=colour, width=3)
            if predicted[i] != label:
                draw.rectangle((left, top, left + 19, top + 17), fill=colour)
                draw.text((left + 3, top + 1), str(predicted[i]), fill="white", font=font)
    return np.asarray(sheet)


def _cell(image: Tensor) -> Image.Image:
    pixels = (image.clamp(0, 1) * 255).byte().expand(3, -1, -1).permute(1, 2, 0).numpy()
    return Image.fromarray(pixels).resize((_CELL, _CELL), Image.Resampling.NEAREST)
