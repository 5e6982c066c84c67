"""Few-shot tasks as a pure function of (seed, split, index), the same on every device.

Task ``index`` draws N classes, and in each K + Q drawings, without replacement: those with the smallest random keys.
A key is a hash of (seed, split, index, position), so there is no generator state: resuming needs one integer, ranks
shard tasks by index, and batches can be split anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from metalearn.core.short_repr import short_repr
from metalearn.core.text import plural
from metalearn.core.types import Episodes, check_tensors
from metalearn.data.counter_rng import random_keys, task_keys

_LARGEST_KEY = torch.iinfo(torch.int64).max


class TaskSampler(Protocol):
    """A stateless stream of tasks: ``EpisodeSampler`` or ``SinusoidSampler``."""

    @property
    def example_shape(self) -> torch.Size:
        """Shape of one input, ``[channels, height, width]`` or ``[features]``."""

    def tasks(self, first: int, count: int) -> Episodes:
        """Return tasks ``first`` to ``first + count - 1``."""

    def batch(self, index: int, tasks: int) -> Episodes:
        """Return batch number ``index`` of ``tasks`` tasks."""


@dataclass(frozen=True)
class TaskShape:
    """N ways, K shots (support examples per class) and Q queries per class."""

    ways: int
    shots: int
    queries: int

    def __post_init__(self) -> None:
        for name in ("ways", "shots", "queries"):
            if getattr(self, name) < 1:
                raise ValueError(f"TaskShape: {name}={getattr(self, name)}; it must be at least 1.")


@dataclass(frozen=True, eq=False)
class EpisodeSampler:
    """A sampler of N-way K-shot tasks from class-indexed images.

    Args:
        images: ``[classes, drawings, channels, height, width]`` uint8, on the device of the episodes; with ``counts``,
            ``[total, channels, height, width]``, class after class.
        shape: N, K and Q.
        seed: of the whole stream of tasks.
        split: its name, which makes training and test tasks of one seed independent. It selects no classes: give the
            images of the split.
        counts: images of each class, if they differ; equal counts give the same tasks as ``None``.

    Raises:
        ValueError: if the images have fewer classes than N or a class has fewer drawings than K + Q, or if the counts
            do not add up to the images.

    Examples:
        >>> images = torch.zeros(10, 20, 1, 28, 28, dtype=torch.uint8)
        >>> EpisodeSampler(images, TaskShape(5, 1, 3), seed=0, split="train").tasks(0, 8).query_x.shape
        torch.Size([8, 15, 1, 28, 28])
    """

    images: Tensor
    shape: TaskShape
    seed: int
    split: str
    counts: Sequence[int] | None = None

    __repr__ = short_repr

    def __post_init__(self) -> None:
        self._check_images()
        if self.counts is not None and (sum(self.counts) != len(self.images) or min(self.counts, default=0) < 0):
            raise ValueError(
                f"EpisodeSampler: counts add up to {sum(self.counts)}, but there are {len(self.images)} images in "
                f"split '{self.split}'; give the number of images of each class, in the order of the images."
            )
        sizes = self._sizes
        if self.shape.ways > len(sizes):
            raise ValueError(
                f"EpisodeSampler: {self.shape.ways} ways, but split '{self.split}' has only "
                f"{plural(len(sizes), 'class', 'classes')}."
            )
        if self.shape.shots + self.shape.queries > min(sizes):
            least = min(sizes)
            which = "drawings a class" if self.counts is None else f"images in class {sizes.index(least)}"
            raise ValueError(
                f"EpisodeSampler: {self.shape.shots} shots and {self.shape.queries} queries a class, but split "
                f"'{self.split}' has only {least} {which}; the two sets must not overlap."
            )

    def _check_images(self) -> None:
        dims, form = (5, "classes, drawings") if self.counts is None else (4, "total")
        check_tensors({"EpisodeSampler: images": self.images})
        if self.images.dtype != torch.uint8 or self.images.dim() != dims:
            raise ValueError(
                f"EpisodeSampler: images must be uint8 [{form}, channels, height, width], got "
                f"{self.images.dtype} {tuple(self.images.shape)}."
            )

    @property
    def example_shape(self) -> torch.Size:
        """Shape of one image, ``[channels, height, width]``."""
        return self.images.shape[2 if self.counts is None else 1 :]

    def batch(self, index: int, tasks: int) -> Episodes:
        """Return batch number ``index`` of ``tasks`` tasks."""
        return self.tasks(index * tasks, tasks)

    def tasks(self, first: int, count: int) -> Episodes:
        """Return tasks ``first`` to ``first + count - 1``: float32 images in [0, 1], labels 0 to N - 1."""
        ways, shots, queries = self.shape.ways, self.shape.shots, self.shape.queries
        classes, drawings = self.draw(first, count)
        if self.counts is None:
            drawn = self.images[classes[:, :, None], drawings]
        else:
            drawn = self.images[self._offsets_and_sizes[0][classes][:, :, None] + drawings]
        x = drawn.to(torch.float32).div_(255) if drawn.dtype == torch.uint8 else drawn.to(torch.float32)
        y = torch.arange(ways, device=x.device)[:, None].expand(count, ways, shots + queries)
        sets = ((t[:, :, :shots], t[:, :, shots:]) for t in (x, y))
        (support_x, query_x), (support_y, query_y) = ((a.flatten(1, 2), b.flatten(1, 2)) for a, b in sets)
        return Episodes(support_x, support_y, query_x, query_y)

    def draw(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Draw the classes ``[T, N]`` and drawings ``[T, N, K + Q]``, numbered within each class, of those tasks."""
        ways, each, most = self.shape.ways, self.shape.shots + self.shape.queries, max(self._sizes)
        keys = task_keys(self.seed, self.split, first, count, self.images.device)
        classes = random_keys(keys, len(self._sizes), salt=1).topk(ways, largest=False).indices
        drawing_keys = random_keys(keys, ways * most, salt=2).view(count, ways, most)
        if self.counts is not None:  # drawings that a smaller class lacks come last
            numbers = torch.arange(most, device=classes.device)
            absent = numbers >= self._offsets_and_sizes[1][classes][:, :, None]
            drawing_keys = drawing_keys.masked_fill(absent, _LARGEST_KEY)
        return classes, drawing_keys.topk(each, largest=False).indices

    @cached_property
    def _sizes(self) -> list[int]:
        """Number of images of each class."""
        return [self.images.shape[1]] * len(self.images) if self.counts is None else list(self.counts)

    @cached_property
    def _offsets_and_sizes(self) -> Tensor:
        """First image and number of images of each class, ``[2, classes]``."""
        sizes = torch.tensor(self._sizes)
        return torch.stack([sizes.cumsum(0) - sizes, sizes]).to(self.images.device)
