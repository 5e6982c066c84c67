"""Detect dark drawings on a light background by the images' borders, and invert them for runs of white on black."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from metalearn.config.options import DataConfig, GlyphsConfig, OmniglotConfig
from metalearn.core.text import plural

log = logging.getLogger(__name__)

_LIGHT = 0.5  # brightness of a border, from 0 (black) to 1


def should_invert(choice: bool | str, images: Tensor, data: DataConfig) -> bool:
    """Return whether to exchange black and white; the decision for ``"auto"`` is logged with its reason.

    ``images`` are uint8 ``[images, channels, height, width]``, of the support set if there is one.
    """
    if choice != "auto":
        return str(choice).lower() == "true"
    if not isinstance(data, (OmniglotConfig, GlyphsConfig)):
        return False  # the run was trained on the user's own images
    borders = border_brightness(images)
    light = borders > _LIGHT
    inverted = bool(light.float().mean() > 0.5)
    log.info(
        "The run was trained on white drawings on black (%s), and the images' borders are %s (mean brightness %.2f): "
        "%s (invert=auto).",
        *(data.name, "light" if inverted else "dark", borders.mean().item()),
        "black and white are exchanged" if inverted else "they are not changed",
    )
    if odd := int((light != inverted).sum()):
        log.warning(
            "%s of %d with %s borders, unlike the others; all are treated the same (invert=%s).",
            *(plural(odd, "image"), len(images), "dark" if inverted else "light", str(inverted).lower()),
        )
    return inverted


def border_brightness(images: Tensor) -> Tensor:
    """Return the mean brightness of the outermost pixels, ``[images]`` in [0, 1], of uint8 ``[images, C, H, W]``."""
    inside = torch.zeros(images.shape[-2:], dtype=torch.bool)
    inside[1:-1, 1:-1] = True
    return images[..., ~inside].flatten(1).double().mean(dim=1) / 255


def apply_inversion(images: Tensor, inverted: bool) -> Tensor:
    """Return uint8 images, inverted if ``inverted``."""
    return 255 - images if inverted else images


def warn_if_inverted(images: Tensor, data: DataConfig) -> None:
    """Warn if images ``[images, C, H, W]`` in [0, 1] are dark on light and the run's are light on dark."""
    if not isinstance(data, (OmniglotConfig, GlyphsConfig)):
        return
    light = border_brightness((images.detach().cpu() * 255).byte()) > _LIGHT
    if light.double().mean() > 0.5:
        log.warning(
            "The run was trained on white drawings on black (%s), and these images' borders are light: give "
            "1 - images (255 - images for uint8), or read folders with Learner.read, which inverts them.",
            data.name,
        )
