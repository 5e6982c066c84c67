"""Few-shot tasks as a pure function of (seed, split, index), the same on every device.

Task ``index`` draws N classes, and in each K + Q drawings, without replacement: those with the smallest random keys.
A key is a hash of (seed, split, index, position), so no generator has a state: resuming needs one integer, ranks share
tasks by index, and a batch is the same however it is cut.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from metalearn.types import Episodes

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64: splitmix64's increment
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


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
    """Draws N-way K-shot tasks from class-indexed images.

    Args:
        images: ``[classes, drawings, channels, height, width]`` uint8, on the device where episodes are wanted.
        shape: N, K and Q.
        seed: of the whole stream of tasks.
        split: name of the split, so that training and test tasks of one seed have nothing to do with each other.

    Raises:
        ValueError: if the images have fewer classes than N or fewer drawings than K + Q.

    Example:
        >>> images = torch.zeros(10, 20, 1, 28, 28, dtype=torch.uint8)
        >>> EpisodeSampler(images, TaskShape(5, 1, 3), seed=0, split="train").tasks(0, 8).query_x.shape
        torch.Size([8, 15, 1, 28, 28])
    """

    images: Tensor
    shape: TaskShape
    seed: int
    split: str

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 5:
            raise ValueError(
                "EpisodeSampler: images must be uint8 [classes, drawings, channels, height, width], got "
                f"{self.images.dtype} {tuple(self.images.shape)}."
            )
        classes, drawings = self.images.shape[:2]
        if self.shape.ways > classes:
            raise ValueError(
                f"EpisodeSampler: {self.shape.ways} ways, but split '{self.split}' has only {classes} classes."
            )
        if self.shape.shots + self.shape.queries > drawings:
            raise ValueError(
                f"EpisodeSampler: {self.shape.shots} shots and {self.shape.queries} queries a class, but split "
                f"'{self.split}' has only {drawings} drawings a class; the two sets must not overlap."
            )

    def batch(self, index: int, tasks: int) -> Episodes:
        """The ``index``-th batch of that many tasks."""
        return self.tasks(index * tasks, tasks)

    def tasks(self, first: int, count: int) -> Episodes:
        """Tasks ``first`` to ``first + count - 1``: images in [0, 1] as float32, labels 0 to N - 1 in class order."""
        ways, shots, queries = self.shape.ways, self.shape.shots, self.shape.queries
        classes, drawings = self.draw(first, count)
        x = self.images[classes[:, :, None], drawings].to(torch.float32).div_(255)
        support_x, query_x = x[:, :, :shots].flatten(1, 2), x[:, :, shots:].flatten(1, 2)
        labels = torch.arange(ways, device=x.device)
        return Episodes(
            support_x=support_x,
            support_y=labels.repeat_interleave(shots).repeat(count, 1),
            query_x=query_x,
            query_y=labels.repeat_interleave(queries).repeat(count, 1),
        )

    def draw(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """The classes ``[T, N]`` and drawings ``[T, N, K + Q]`` of those tasks."""
        n_classes, n_drawings = self.images.shape[:2]
        ways, each = self.shape.ways, self.shape.shots + self.shape.queries
        seed = torch.full((), self.seed, dtype=torch.int64, device=self.images.device)  # a copy would wait for the GPU
        stream = _mix(_mix(seed) + zlib.crc32(self.split.encode()))
        task_keys = _mix(stream + _GOLDEN * torch.arange(first, first + count, device=self.images.device))
        class_keys = _keys(task_keys, n_classes, salt=1)
        drawing_keys = _keys(task_keys, ways * n_drawings, salt=2).view(count, ways, n_drawings)
        return (
            class_keys.topk(ways, largest=False).indices,
            drawing_keys.topk(each, largest=False).indices,
        )


def _keys(task_keys: Tensor, count: int, *, salt: int) -> Tensor:
    """``count`` random int64 for every task, ``[T, count]``."""
    positions = torch.arange(1, count + 1, device=task_keys.device) * _GOLDEN
    return _mix(_mix(task_keys + salt)[:, None] + positions)


def _mix(z: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele, Lea & Flood 2014) on int64, which wraps as the unsigned one does."""
    z = (z ^ _shift_right(z, 30)) * _MIX_1
    z = (z ^ _shift_right(z, 27)) * _MIX_2
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """A logical shift; torch's ``>>`` on int64 copies the sign bit."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
