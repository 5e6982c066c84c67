"""The models equal those of the literature, and all engines agree on them."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, leaky_relu

from metalearn import Episodes, InnerLoop, Params, functionalize, meta_gradient
from metalearn.config.compose import compose, to_dataclass
from metalearn.config.options import ResNet12Config
from metalearn.config.schema import TrainConfig
from metalearn.core.params import relative_error
from metalearn.derivatives import gradcheck
from metalearn.metagrad import ENGINES
from metalearn.models import MLP, ContextConv4, ContextMLP, Conv4, ResNet12
from metalearn.training.experiment import build_model

NARROW = (2, 3, 4, 5)
COLOUR: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: MLP(3 * 20 * 20, 3),
    "resnet12": lambda: ResNet12(3, widths=NARROW),
    "conv4": lambda: Conv4(3, channels=3, width=4),
    "conv4 with max-pooling": lambda: Conv4(3, channels=3, width=4, pool="max"),
}


def colour_episodes(size: int = 20) -> Episodes:
    y = torch.arange(3).repeat(2, 1)
    x = torch.rand(2, 2, 3, 3, size, size, dtype=torch.float64)
    return Episodes(x[0], y, x[1], y)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("pool", ["stride", "max"])
def test_conv4_equals_finns(pool: str) -> None:
    model = Conv4(5, pool=pool)
    # (1 + 3 x 64) x 64 filters of 3 x 3 (without biases, which BatchNorm takes away), 4 BatchNorms, a head of 64 to 5.
    assert count(model) == (1 + 3 * 64) * 64 * 9 + 4 * 2 * 64 + 64 * 5 + 5
    assert model(torch.rand(7, 1, 28, 28)).shape == (7, 5)
    sizes = [x.shape[-1] for x in accumulate(model.features, lambda x, f: f(x), initial=torch.rand(2, 1, 28, 28))]
    assert sizes == {"stride": [28, 14, 7, 4, 2], "max": [28, 14, 7, 3, 1]}[pool]


def test_mlp_equals_finns() -> None:
    model = MLP(784, 5)
    widths = [784, 256, 128, 64, 64, 5]
    assert count(model) == sum((a + 1) * b for a, b in pairwise(widths)) + 2 * sum(widths[1:-1])
    assert model(torch.rand(7, 1, 28, 28)).shape == (7, 5)
    assert not any(isinstance(m, nn.BatchNorm1d) for m in MLP(4, 2, hidden=[3], batch_norm=False).modules())


def test_resnet12_equals_metaoptnets() -> None:
    # A block: 3 x 3 filters from a to b, b to b and b to b channels, the 1 x 1 shortcut, four BatchNorms of 2b.
    widths = [3, 64, 160, 320, 640]
    blocks = sum(9 * (a * b + 2 * b * b) + a * b + 8 * b for a, b in pairwise(widths))
    model = ResNet12(5)
    assert count(model) == blocks + 640 * 5 + 5
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 4 * 4
    assert all(c.bias is None for c in convolutions)
    assert {m.negative_slope for m in model.modules() if isinstance(m, nn.LeakyReLU)} == {0.1}


def test_block_equals_its_formula() -> None:
    def normed(x: Tensor, convolution: str) -> Tensor:  # BatchNorm starts as (x - mean) / std over the batch
        x = conv2d(x, weights[f"blocks.0.{convolution}.weight"], padding="same")
        return (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()

    model, x = ResNet12(5, widths=(4,)).double(), torch.rand(3, 3, 8, 8, dtype=torch.float64)
    weights = dict(model.named_parameters())
    inside = leaky_relu(normed(leaky_relu(normed(x, "residual.0"), 0.1), "residual.3"), 0.1)
    y = leaky_relu(normed(inside, "residual.6") + normed(x, "shortcut.0"), 0.1)
    pooled = y.unflatten(2, (4, 2)).unflatten(4, (4, 2)).amax((3, 5))
    expected = pooled.mean((2, 3)) @ weights["head.weight"].mT + weights["head.bias"]
    torch.testing.assert_close(model(x), expected)


def test_each_block_halves_the_image_size() -> None:
    model = ResNet12(5, widths=NARROW)
    outputs = accumulate(model.blocks, lambda x, block: block(x), initial=torch.rand(2, 3, 84, 84))
    assert [tuple(x.shape[1:3]) for x in outputs] == [(3, 84), (2, 42), (3, 21), (4, 10), (5, 5)]
    assert model(torch.rand(2, 3, 16, 16)).shape == (2, 5)
    assert ResNet12(7, channels=1, widths=(4,))(torch.rand(2, 1, 2, 2)).shape == (2, 7)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Conv4(5, pool="avg"), "pool='avg'; it must be 'stride' or 'max'"),
        (lambda: ResNet12(5, widths=()), r"ResNet12: widths=\(\).*at least one width, each at least 1"),
        (lambda: ResNet12(5, widths=(4, 0)), r"ResNet12: widths=\(4, 0\).*at least one width, each at least 1"),
        (lambda: ContextMLP(1, 1, context=0), "context=0; it must be 1 or more"),
        (lambda: ContextConv4(3, context=0), "context=0; it must be 1 or more"),
    ],
)
def test_invalid_sizes_raise(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("model", COLOUR)
def test_engines_agree_on_colour_images(model: str) -> None:
    episodes = colour_episodes()
    forward, theta = functionalize(COLOUR[model]().double())
    found = {
        engine: meta_gradient(forward, theta, episodes, InnerLoop(lr=0.1, steps=2, engine=engine)).grads
        for engine in ENGINES
    }
    first = meta_gradient(forward, theta, episodes, InnerLoop(lr=0.1, steps=2, second_order=False)).grads
    for engine in ENGINES:
        assert relative_error(found[engine], found["unroll"]) < 1e-9
    assert relative_error(first, found["unroll"]) > 1e-3, "the second-order term is there"


def test_meta_gradient_equals_finite_differences() -> None:
    episodes, inner = colour_episodes(16), InnerLoop(lr=0.1, steps=1)
    forward, theta = functionalize(ResNet12(3, widths=NARROW).double())

    def query_loss(params: Params) -> Tensor:
        return meta_gradient(forward, params, episodes, inner).loss

    grads = meta_gradient(forward, theta, episodes, inner).grads
    steps = (1e-5, 1e-6, 1e-7)  # short enough to cross no kink of a rectifier or a maximum
    assert gradcheck.directional(query_loss, theta, gradient_at_x=grads, steps=steps).error < 1e-6


def test_conv4_feature_sizes_on_mini_imagenet() -> None:
    for pool, size in (("max", 5), ("stride", 6)):
        model = Conv4(5, channels=3, width=4, pool=pool)
        assert model.features(torch.rand(2, 3, 84, 84)).shape == (2, 4, size, size)
        assert model.head.in_features == 4, "the mean over positions"
    assert Conv4(5, width=4, pool="max")(torch.rand(2, 1, 16, 16)).shape == (2, 5)


def test_build_resnet12_from_config() -> None:
    config = to_dataclass(compose("train", ["data=glyphs", "model=resnet12"]), TrainConfig)
    assert isinstance(config.model, ResNet12Config)
    assert tuple(config.model.widths) == inspect.signature(ResNet12).parameters["widths"].default
    small = dataclasses.replace(config, model=dataclasses.replace(config.model, widths=list(NARROW)))
    assert build_model(small, torch.Size([1, 28, 28]), 5)(torch.rand(2, 1, 28, 28)).shape == (2, 5)
