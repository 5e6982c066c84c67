"""A small residual network: a stem, residual blocks, the mean over positions, and a linear head."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import relu


class ResidualNet(nn.Module):
    """Blocks of ``x + f(x)`` with f two 3x3 convolutions (He et al. 2016, eq. 1), each with BatchNorm of the batch.

    Args:
        ways: N, the number of outputs.
        channels: of the input images.
        width: filters of every convolution.
        blocks: how many.

    Shapes: ``[examples, channels, height, width]`` to logits ``[examples, ways]``; the stem halves height and width
    twice.

    Example:
        >>> ResidualNet(ways=5)(torch.zeros(10, 1, 28, 28)).shape
        torch.Size([10, 5])

    Reference: He et al. 2016, arXiv 1512.03385.
    """

    def __init__(self, ways: int, *, channels: int = 1, width: int = 16, blocks: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, kernel_size=5, stride=4, padding=2)
        self.blocks = nn.Sequential(*[_Block(width) for _ in range(blocks)])
        self.head = nn.Linear(width, ways)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[examples, ways]`` of images ``[examples, channels, height, width]``."""
        logits: Tensor = self.head(self.blocks(self.stem(x)).mean(dim=(-2, -1)))
        return logits


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, kernel_size=3, padding=1)
        self.first_norm = nn.BatchNorm2d(width, track_running_stats=False)
        self.second = nn.Conv2d(width, width, kernel_size=3, padding=1)
        self.second_norm = nn.BatchNorm2d(width, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        inside = relu(self.first_norm(self.first(x)))
        return relu(x + self.second_norm(self.second(inside)))
