"""Small episodes in float64."""

from __future__ import annotations

import torch

from metalearn import Episodes


def image_episodes(
    *,
    tasks: int = 3,
    ways: int = 3,
    shots: int = 1,
    queries: int = 2,
    size: int = 28,
    dtype: torch.dtype = torch.float64,
) -> Episodes:
    """Draw random images, with labels in class order."""
    labels = torch.arange(ways)
    return Episodes(
        support_x=torch.rand(tasks, ways * shots, 1, size, size, dtype=dtype),
        support_y=labels.repeat_interleave(shots).repeat(tasks, 1),
        query_x=torch.rand(tasks, ways * queries, 1, size, size, dtype=dtype),
        query_y=labels.repeat_interleave(queries).repeat(tasks, 1),
    )
