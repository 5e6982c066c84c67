"""ResNet-12, the network of few-shot papers since 2018 (Oreshkin et al. 2018; Lee et al. 2019).

A block is   pool(leaky(BN(conv(leaky(BN(conv(leaky(BN(conv(x)))))))) + BN(conv1x1(x)))).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

_SLOPE = 0.1


class ResNet12(nn.Module):
    """Residual blocks of three 3x3 convolutions, each ending in a 2x2 max-pool; the mean over positions; a linear head.

    As in MetaOptNet (Lee et al. 2019, section 4.1): LeakyReLU(0.1), a 1x1 convolution with BatchNorm as shortcut, and
    no biases in convolutions. Unlike there, no DropBlock and no dropout; the head takes the mean over positions (as in
    Oreshkin et al.); and BatchNorm always uses the statistics of the current batch, as MAML keeps no running ones.

    Args:
        ways: N, the number of classes.
        channels: of the input images.
        widths: filters of each block, one block a width; Oreshkin et al. take (64, 128, 256, 512).

    Shapes: ``[examples, channels, height, width]`` to logits ``[examples, ways]``. Images of at least 2^blocks pixels
    a side: 16 x 16 for four blocks.

    Raises:
        ValueError: if there is no width, or one below 1.

    Examples:
        >>> ResNet12(ways=5, widths=(8, 16, 32, 64))(torch.zeros(10, 3, 84, 84)).shape
        torch.Size([10, 5])

    Reference: Oreshkin et al. 2018, arXiv 1805.10123; Lee et al. 2019, arXiv 1904.03758.
    """

    def __init__(self, ways: int, *, channels: int = 3, widths: Sequence[int] = (64, 160, 320, 640)) -> None:
        super().__init__()
        if not widths or min(widths) < 1:
            raise ValueError(f"ResNet12: widths={tuple(widths)}; give at least one width, each at least 1.")
        self.blocks = nn.Sequential(*[_Block(*pair) for pair in pairwise([channels, *widths])])
        self.head = nn.Linear(widths[-1], ways)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[examples, ways]`` of images ``[examples, channels, height, width]``."""
        return self.head(self.blocks(x).mean(dim=(-2, -1)))


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            *_conv_norm(inputs, outputs, 3),
            nn.LeakyReLU(_SLOPE),
            *_conv_norm(outputs, outputs, 3),
            nn.LeakyReLU(_SLOPE),
            *_conv_norm(outputs, outputs, 3),
        )
        self.shortcut = nn.Sequential(*_conv_norm(inputs, outputs, 1))
        self.end = nn.Sequential(nn.LeakyReLU(_SLOPE), nn.MaxPool2d(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.residual(x) + self.shortcut(x))


def _conv_norm(inputs: int, outputs: int, size: int) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """Return a convolution and its BatchNorm, which makes a bias superfluous."""
    return (
        nn.Conv2d(inputs, outputs, kernel_size=size, padding=size // 2, bias=False),
        nn.BatchNorm2d(outputs, track_running_stats=False),
    )
