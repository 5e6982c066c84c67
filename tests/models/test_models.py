"""Shapes and sizes of the models."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from metalearn import functionalize
from metalearn.models import MLP, Conv4


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("pool", ["stride", "max"])
def test_conv4_equals_finns(pool: str) -> None:
    model = Conv4(5, pool=pool)
    # (1 + 3 x 64) x 64 filters of 3 x 3 (without biases, which BatchNorm takes away), 4 BatchNorms, a head of 64 to 5.
    assert count(model) == (1 + 3 * 64) * 64 * 9 + 4 * 2 * 64 + 64 * 5 + 5
    assert model(torch.rand(7, 1, 28, 28)).shape == (7, 5)
    sizes: list[int] = []
    x = torch.rand(2, 1, 28, 28)
    for block in model.features:
        x = block(x)
        sizes.append(x.shape[-1])
    assert sizes == {"stride": [14, 7, 4, 2], "max": [14, 7, 3, 1]}[pool]


def test_conv4_accepts_colour_and_other_sizes() -> None:
    assert Conv4(3, channels=3, width=8)(torch.rand(2, 3, 84, 84)).shape == (2, 3)


def test_conv4_raises_on_unknown_pool() -> None:
    with pytest.raises(ValueError, match="pool='avg'; it must be 'stride' or 'max'"):
        Conv4(5, pool="avg")


def test_mlp_equals_finns() -> None:
    model = MLP(784, 5)
    widths = [784, 256, 128, 64, 64]
    linear = sum((a + 1) * b for a, b in zip(widths, [*widths[1:], 5], strict=True))
    assert count(model) == linear + 2 * sum(widths[1:])
    assert model(torch.rand(7, 1, 28, 28)).shape == (7, 5)
    assert not any(isinstance(m, nn.BatchNorm1d) for m in MLP(4, 2, hidden=[3], batch_norm=False).modules())


@pytest.mark.parametrize("model", [Conv4(5), MLP(784, 5)])
def test_models_can_be_functionalized(model: nn.Module) -> None:
    forward, theta = functionalize(model)
    assert forward(theta, torch.rand(4, 1, 28, 28)).shape == (4, 5)
