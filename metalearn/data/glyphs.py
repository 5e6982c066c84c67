"""Glyphs: procedural handwriting that needs no file and no network.

A class is a character of a few random strokes: cubic Bezier curves, each of which starts at an end of an earlier one. A
drawing is an instance of it: its control points are jittered, then sheared, rotated, scaled and moved together. Ink is
the sum of Gaussian dots along the strokes, which is a product of two small matrices:

    ink(y, x) = 1 - exp(-density * sum_p exp(-((x - x_p)^2 + (y - y_p)^2) / (2 r^2)))
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_POINTS = 40  # dots per stroke: closer than the pen's radius for all but the longest strokes
_DENSITY = 0.8


def make_glyphs(
    *,
    classes: int,
    drawings: int = 20,
    size: int = 28,
    strokes: int = 3,
    jitter: float = 0.13,
    seed: int = 0,
) -> Tensor:
    """Draw instances (``drawings``) of each of ``classes`` characters of a few strokes.

    ``jitter`` is the standard deviation of a control point between drawings, as a fraction of the image's width.

    Returns:
        ``[classes, drawings, 1, size, size]`` uint8, white on black.

    Examples:
        >>> make_glyphs(classes=3, drawings=2).shape
        torch.Size([3, 2, 1, 28, 28])
    """
    generator = torch.Generator().manual_seed(seed)
    characters = _random_characters(classes, strokes, generator)
    instances = _draw_instances(characters, drawings, jitter, generator)
    return torch.cat([_render(chunk, size) for chunk in instances.split(64)])


def _random_characters(classes: int, strokes: int, generator: torch.Generator) -> Tensor:
    """Return control points ``[classes, strokes, 4, 2]`` in [0, 1]."""
    points = torch.rand(classes, strokes, 4, 2, generator=generator)
    points[:, :, [0, 3]] = 0.1 + 0.8 * points[:, :, [0, 3]]
    points[:, :, [1, 2]] = 1.6 * points[:, :, [1, 2]] - 0.3  # a curve comes only part of the way to these two
    for stroke in range(1, strokes):
        before = torch.randint(stroke, (classes,), generator=generator)
        end = 3 * torch.randint(2, (classes,), generator=generator)
        points[:, stroke, 0] = points[torch.arange(classes), before, end]
    return points


def _draw_instances(characters: Tensor, drawings: int, jitter: float, generator: torch.Generator) -> Tensor:
    """Return instances of characters, ``[classes, drawings, strokes, 4, 2]``."""
    classes, strokes = characters.shape[:2]
    noise = torch.randn(classes, drawings, strokes, 4, 2, generator=generator) * jitter
    points = characters[:, None] + noise - 0.5
    angle, shear, grow = torch.randn(3, classes, drawings, generator=generator) * torch.tensor(
        [math.pi / 18, 0.15, 0.1]
    ).view(3, 1, 1)
    cos, sin = angle.cos() * grow.exp(), angle.sin() * grow.exp()
    affine = torch.stack([cos, cos * shear - sin, sin, sin * shear + cos], dim=-1).view(classes, drawings, 1, 2, 2)
    shift = torch.randn(classes, drawings, 1, 1, 2, generator=generator) * 0.04
    return points @ affine.transpose(-1, -2) + shift + 0.5


def _render(control: Tensor, size: int) -> Tensor:
    """Render control points ``[classes, drawings, strokes, 4, 2]`` as uint8 ``[classes, drawings, 1, size, size]``."""
    t = torch.linspace(0, 1, _POINTS)
    bernstein = torch.stack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], dim=-1)
    dots = (bernstein @ control).flatten(2, 3)  # [classes, drawings, dots, 2]
    pixels = (torch.arange(size) + 0.5) / size
    radius = 0.7 / size
    dot_x, dot_y = (torch.exp(-((dots[..., i, None] - pixels) ** 2) / (2 * radius**2)) for i in (0, 1))
    ink = 1 - torch.exp(-_DENSITY * (dot_y.transpose(-1, -2) @ dot_x))
    return (ink * 255).round().to(torch.uint8).unsqueeze(2)
