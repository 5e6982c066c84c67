"""Tasks of random images: what they show changes neither memory nor time."""

from __future__ import annotations

import torch
from torch import Tensor

from metalearn.commands.benchmark.engine_settings import TaskSpec
from metalearn.core.types import Episodes


def random_episodes(setting: TaskSpec, device: torch.device) -> Episodes:
    """A batch ``[T, N * examples, 1, 28, 28]`` in class order, from torch's default generator."""
    labels = torch.arange(setting.ways, device=device)

    def images(each: int) -> Tensor:
        return torch.rand(setting.tasks, setting.ways * each, 1, 28, 28, device=device)

    def targets(each: int) -> Tensor:
        return labels.repeat_interleave(each).repeat(setting.tasks, 1)

    return Episodes(images(setting.shots), targets(setting.shots), images(setting.queries), targets(setting.queries))
