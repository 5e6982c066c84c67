"""Small networks for tests of the meta-gradient."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from metalearn.commands.verify.cases import PatchTransformer, ResidualNet
from metalearn.models import MLP, Conv4

MODELS: dict[str, Callable[[], nn.Module]] = {
    "conv4": lambda: Conv4(3, width=6),
    "conv4 with max-pooling": lambda: Conv4(3, width=6, pool="max"),
    "mlp": lambda: MLP(28 * 28, 3, hidden=(16, 8)),
    "transformer": lambda: PatchTransformer(3, patch=14, width=8, heads=2),
    "residual": lambda: ResidualNet(3, width=4),
}


class Lambda(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def linear_on_sequences(*first: nn.Module) -> nn.Sequential:
    """Return a linear classifier of sequences ``[5, 8]`` after some layers."""
    return nn.Sequential(*first, nn.Flatten(), nn.Linear(40, 3))
