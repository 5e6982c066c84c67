"""Training, validation and test classes of an image data set; each data set's file chooses which these are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from metalearn.core.short_repr import short_repr
from metalearn.data.sampler import EpisodeSampler, TaskShape


class ClassSizes(NamedTuple):
    """Number of images of each class, in the order of a split's images."""

    train: Sequence[int]
    validation: Sequence[int]
    test: Sequence[int]


@dataclass(frozen=True, eq=False)
class ImageSplits:
    """Class-indexed images of each split, ``[classes, drawings, channels, height, width]`` uint8.

    With ``counts``, class sizes that differ, each tensor is ``[total, channels, height, width]``, class after class.
    """

    name: str
    train: Tensor
    validation: Tensor
    test: Tensor
    counts: ClassSizes | None = None

    __repr__ = short_repr

    def to(self, device: torch.device | str) -> ImageSplits:
        """Move the images to another device."""
        train, validation, test = (t.to(device) for t in (self.train, self.validation, self.test))
        return ImageSplits(self.name, train, validation, test, self.counts)

    def classes(self, split: str) -> int:
        """Return the number of classes in ``"train"``, ``"validation"`` or ``"test"``."""
        return len(getattr(self, split) if self.counts is None else getattr(self.counts, split))

    def sampler(self, split: str, shape: TaskShape, seed: int) -> EpisodeSampler:
        """Return a sampler of tasks from ``"train"``, ``"validation"`` or ``"test"``."""
        counts = None if self.counts is None else getattr(self.counts, split)
        return EpisodeSampler(getattr(self, split), shape, seed, split, counts)


def with_rotations(images: Tensor) -> Tensor:
    """Make four classes of each by rotations of 0, 90, 180, 270 degrees (Santoro et al. 2016; Finn et al. 2017)."""
    return torch.cat([images.rot90(quarter_turns, dims=(-2, -1)) for quarter_turns in range(4)])
