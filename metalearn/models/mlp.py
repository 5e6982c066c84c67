"""A fully connected network for images or vectors (Finn et al. 2017, section 5.2, the non-convolutional model)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class MLP(nn.Module):
    """Hidden layers of linear, BatchNorm and ReLU, then a linear head.

    Args:
        inputs: features of one example, after flattening.
        ways: N, the number of outputs.
        hidden: width of each hidden layer; Finn's for Omniglot by default.
        batch_norm: whether BatchNorm (with batch statistics) precedes each ReLU.

    Shapes: ``[examples, ...]`` with ``inputs`` entries an example, to ``[examples, ways]``.

    Examples:
        >>> MLP(784, 5)(torch.zeros(10, 1, 28, 28)).shape
        torch.Size([10, 5])
    """

    def __init__(
        self, inputs: int, ways: int, *, hidden: Sequence[int] = (256, 128, 64, 64), batch_norm: bool = True
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        for width in hidden:
            layers.append(nn.Linear(inputs, width))
            if batch_norm:
                layers.append(nn.BatchNorm1d(width, track_running_stats=False))
            layers.append(nn.ReLU())
            inputs = width
        self.layers = nn.Sequential(*layers, nn.Linear(inputs, ways))

    def forward(self, x: Tensor) -> Tensor:
        """Return outputs ``[examples, ways]`` of inputs ``[examples, ...]``."""
        return self.layers(x)
