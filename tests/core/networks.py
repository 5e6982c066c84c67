"""Small modules and tasks for the tests of ``functionalize``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metalearn import Episodes

X = torch.randn(4, 5)
TASKS = Episodes(torch.randn(2, 4, 5), torch.randint(3, (2, 4)), torch.randn(2, 3, 5), torch.randint(3, (2, 3)))


def chain(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 5), *layers, nn.Linear(5, 3))


class Net(nn.Module):
    """A common base: two layers of 5 units and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))
