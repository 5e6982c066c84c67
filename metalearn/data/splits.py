"""Classes for training, validation and test, with nothing in common."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ImageSplits:
    """Class-indexed images, each ``[classes, drawings, channels, height, width]`` uint8.

    Args:
        name: of the data set.
        train: classes to meta-train on.
        validation: classes that choose the checkpoint.
        test: classes seen once, at the end.
    """

    name: str
    train: Tensor
    validation: Tensor
    test: Tensor

    def to(self, device: torch.device | str) -> ImageSplits:
        """The same images on another device."""
        return ImageSplits(self.name, *(t.to(device) for t in (self.train, self.validation, self.test)))


def with_rotations(images: Tensor) -> Tensor:
    """Four classes from each: rotated by 0, 90, 180 and 270 degrees (Santoro et al. 2016; Finn et al. 2017)."""
    return torch.cat([images.rot90(quarter_turns, dims=(-2, -1)) for quarter_turns in range(4)])
