"""Dark ink on light paper, for runs of white drawings on black: noticed by the images' borders, and exchanged."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from metalearn.config.schema import DataConfig, GlyphsConfig, OmniglotConfig

log = logging.getLogger(__name__)

_LIGHT = 0.5


def should_invert(choice: bool | str, images: Tensor, data: DataConfig) -> bool:
    """Whether black and white are to be exchanged; says what was decided, and why.

    Args:
        choice: ``auto``, or what was asked for.
        images: ``[images, channels, height, width]`` uint8, of the support set if there is one.
        data: of the run.
    """
    if choice != "auto":
        return str(choice).lower() == "true"
    if not isinstance(data, (OmniglotConfig, GlyphsConfig)):
        return False  # such runs were trained on a user's own images
    borders = border_brightness(images)
    light = borders > _LIGHT
    inverted = bool(light.float().mean() > 0.5)
    log.info(
        "The run was trained on white drawings on black (%s), and the images' borders are %s (%.2f of white in the "
        "mean): %s (invert=auto).",
        *(data.name, "light" if inverted else "dark", borders.mean().item()),
        "black and white are exchanged" if inverted else "they are taken as they are",
    )
    if odd := int((light != inverted).sum()):
        log.warning(
            "%d of %d images have %s borders, unlike the others; all are treated alike (invert=%s).",
            *(odd, len(images), "dark" if inverted else "light", str(inverted).lower()),
        )
    return inverted


def border_brightness(images: Tensor) -> Tensor:
    """Mean of the outermost pixels of each image, from 0 (black) to 1: ``[images]``, of uint8 ``[images, C, H, W]``."""
    inside = torch.zeros(images.shape[-2:], dtype=torch.bool)
    inside[1:-1, 1:-1] = True
    return images[..., ~inside].flatten(1).double().mean(dim=1) / 255


def apply_inversion(images: Tensor, inverted: bool) -> Tensor:
    """uint8 images with black and white exchanged, or as they are."""
    return 255 - images if inverted else images


def warn_if_inverted(images: Tensor, data: DataConfig) -> None:
    """Say so where images ``[images, C, H, W]`` in [0, 1] look like ink on paper and the run's do not."""
    if isinstance(data, (OmniglotConfig, GlyphsConfig)):
        light = border_brightness((images.detach().cpu() * 255).byte()) > _LIGHT
        if light.double().mean() > 0.5:
            log.warning(
                "The run was trained on white drawings on black (%s), and these images' borders are light: give "
                "1 - images (255 - images of uint8), or read folders with Learner.read, which exchanges them.",
                data.name,
            )
