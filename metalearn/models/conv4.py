"""Four convolutions: the network of most few-shot papers (Vinyals et al. 2016; Finn et al. 2017, section 5.2)."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d

from metalearn.core.types import Params
from metalearn.models.kernels import batch_norm, conv2d, relu

_EPS = 1e-5
_SETTINGS: dict[type, Callable[[nn.Module], Any]] = {
    nn.Conv2d: attrgetter("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "bias"),
    nn.BatchNorm2d: attrgetter("eps", "affine", "running_mean"),
    nn.ReLU: attrgetter("inplace"),
    nn.MaxPool2d: attrgetter("kernel_size", "stride", "padding", "ceil_mode"),
}


class Conv4(nn.Module):
    """Four blocks of 3x3 convolution, BatchNorm and ReLU, the mean over positions, and a linear head.

    With ``pool="stride"`` (Finn's for Omniglot) every convolution has stride 2: 28 to 14, 7, 4, 2 pixels. With
    ``pool="max"`` (Vinyals') it has stride 1 and a 2x2 max-pool follows: 28 to 14, 7, 3, 1.

    On 84 x 84 colour images (mini-ImageNet) these are 42, 21, 11, 6 and 42, 21, 10, 5. The head always takes the mean
    over positions, ``width`` features; Finn et al. do so on Omniglot, while for mini-ImageNet they flatten the
    5 x 5 x 32 features of ``pool="max", width=32``, so that their head has 800 inputs and ours 32.

    BatchNorm always uses the statistics of the current batch; MAML keeps no running ones. It subtracts the mean, so
    convolutions have no bias.

    Args:
        ways: N, the number of classes.
        channels: of the input images.
        width: filters of every convolution.
        pool: ``"stride"`` or ``"max"``.

    Shapes: ``[examples, channels, height, width]`` to logits ``[examples, ways]``. Images of at least 16 x 16 with
    ``pool="max"``, of any size otherwise.

    Raises:
        ValueError: if ``pool`` is neither.

    Examples:
        >>> Conv4(ways=5)(torch.zeros(10, 1, 28, 28)).shape
        torch.Size([10, 5])

    Reference: Finn et al. 2017, arXiv 1703.03400; Vinyals et al. 2016, arXiv 1606.04080.
    """

    def __init__(self, ways: int, *, channels: int = 1, width: int = 64, pool: str = "stride") -> None:
        super().__init__()
        if pool not in ("stride", "max"):
            raise ValueError(f"Conv4: pool={pool!r}; it must be 'stride' or 'max'.")
        inputs = [channels, width, width, width]
        self.features = nn.Sequential(*[_block(n, width, max_pool=pool == "max") for n in inputs])
        self.head = nn.Linear(width, ways)
        self._max_pool = pool == "max"
        self._stride = (1, 1) if self._max_pool else (2, 2)
        self._layers = self._describe()

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[examples, ways]`` of images ``[examples, channels, height, width]``."""
        return self.head(self.features(x).mean(dim=(-2, -1)))

    def supports_batched_forward(self) -> bool:
        """Return whether the layers are still those that ``batched_forward`` computes."""
        return type(self.head) is nn.Linear and self.head.bias is not None and self._describe() == self._layers

    def _describe(self) -> list[Any]:
        """Return the types of all layers but the head, and the settings that ``batched_forward`` relies on."""
        return [
            (type(layer), _SETTINGS[type(layer)](layer) if type(layer) in _SETTINGS else None)
            for block in self.features
            for layer in (block, *block.children())
        ]

    def batched_forward(self, params: Params, x: Tensor) -> Tensor:
        """Return logits ``[T, examples, ways]`` of T tasks, each with its own parameters, faster than ``vmap``."""
        for number in range(len(self.features)):
            weight, gamma, beta = (params[f"features.{number}.{name}"] for name in ("0.weight", "1.weight", "1.bias"))
            x = relu(batch_norm(conv2d(x, weight, stride=self._stride, padding=(1, 1)), gamma, beta, _EPS))
            if self._max_pool:
                x = max_pool2d(x.flatten(0, 1), 2).unflatten(0, x.shape[:2])
        return torch.baddbmm(params["head.bias"].unsqueeze(1), x.mean(dim=(-2, -1)), params["head.weight"].mT)


def _block(inputs: int, outputs: int, *, max_pool: bool) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel_size=3, stride=1 if max_pool else 2, padding=1, bias=False),
        nn.BatchNorm2d(outputs, eps=_EPS, track_running_stats=False),
        nn.ReLU(),
    ]
    return nn.Sequential(*layers, *([nn.MaxPool2d(2)] if max_pool else []))
