"""torchvision's networks and a transformer as they are: every engine against autograd, one task at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torchvision.models as zoo
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import relu6

from metalearn import Episodes, InnerLoop, Params, adapt, functionalize, meta_gradient, predict
from metalearn.core.module_checks import BatchNormMode
from metalearn.core.params import relative_error
from metalearn.core.profiling.memory import PeakTensorMemory
from metalearn.inner.batch_norm_statistics import record_statistics
from metalearn.metagrad.baselines.by_hand import meta_gradient as by_hand
from metalearn.metagrad.meta_gradient import ENGINES
from metalearn.training.evaluation import predict_nontransductive

INNER = InnerLoop(lr=0.002, steps=2)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.Sequential(
        nn.Flatten(1), nn.Unflatten(1, (-1, 8)), nn.TransformerEncoder(layer, 2), nn.Flatten(1), nn.Linear(3072, 3)
    )


def vit() -> nn.Module:
    return zoo.VisionTransformer(
        image_size=32, patch_size=16, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=3
    )


BACKBONES: dict[str, tuple[Callable[[], nn.Module], bool]] = {  # and whether it has running statistics
    "resnet10": (lambda: zoo.ResNet(zoo.resnet.BasicBlock, [1, 1, 1, 1], num_classes=3), True),
    "resnet18": (lambda: zoo.resnet18(num_classes=3), True),
    "mobilenet_v3_small": (lambda: zoo.mobilenet_v3_small(num_classes=3), True),
    "efficientnet_b0": (lambda: zoo.efficientnet_b0(num_classes=3), True),
    "vit": (vit, False),
    "transformer encoder": (encoder, False),
}


def build(name: str) -> nn.Module:
    """Return a network with running statistics as if pretrained, and without anything random."""
    torch.manual_seed(0)
    module = BACKBONES[name][0]().double()
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.weight.data.fill_(0.2)  # with 1, rounding grows to 1e-8 in 50 layers
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.8, 1.25)
        if "Dropout" in type(layer).__name__ or "StochasticDepth" in type(layer).__name__:
            vars(layer)["p"] = 0.0
    return module


def tasks(count: int = 2, side: int = 32) -> Episodes:
    g = torch.Generator().manual_seed(1)
    y = torch.arange(6).remainder(3).expand(count, 6)
    draw = [torch.randn(count, 6, 3, side, side, generator=g, dtype=torch.float64) for _ in range(2)]
    return Episodes(draw[0], y, draw[1], y)


def tasks_for(name: str) -> Episodes:
    return tasks(side=16 if name == "resnet10" else 32)


class ByDefinition(nn.Module):
    """Hard sigmoid, or hard swish, whose kernels have no second derivative in torch."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        gate = relu6(x + 3) / 6
        return gate if self.kind == "Hardsigmoid" else x * gate


@functools.cache
def reference(name: str, batch_norm: BatchNormMode | None) -> Params:
    """Return the meta-gradient of one task at a time by plain autograd."""
    module = build(name)
    for path, layer in list(module.named_modules()):
        if isinstance(layer, (nn.Hardsigmoid, nn.Hardswish)):
            module.set_submodule(path, ByDefinition(type(layer).__name__))
    if batch_norm == "task":
        torch.func.replace_all_batch_norm_modules_(module)
    if batch_norm == "frozen":
        module.eval()
    with sdpa_kernel(SDPBackend.MATH):
        return by_hand(module, tasks_for(name), INNER).grads


CASES = [
    pytest.param(name, batch_norm, marks=[pytest.mark.slow] if BACKBONES[name][1] and name != "resnet10" else [])
    for name, (_, has_statistics) in BACKBONES.items()
    for batch_norm in (("task", "frozen") if has_statistics else (None,))
]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("name", "batch_norm"), CASES)
def test_backbone_equals_autograd(name: str, batch_norm: BatchNormMode | None, engine: str) -> None:
    episodes, module, want = tasks_for(name), build(name), reference(name, batch_norm)
    buffers = {n: b.clone() for n, b in module.named_buffers()}
    inner = replace(INNER, engine=engine)
    forward, theta = functionalize(module, batch_norm=batch_norm)
    for training in (True, False) if engine == "unroll" else (True,):  # the choice counts, not the mode
        module.train(training)
        assert relative_error(meta_gradient(forward, theta, episodes, inner).grads, want) < 1e-9
    assert all(torch.equal(b, buffers[n]) for n, b in module.named_buffers())
    assert {layer.training for layer in module.modules()} == {training}, "as the caller left them"


@pytest.mark.parametrize("name", ["resnet10", "efficientnet_b0"])
def test_the_choice_must_be_named(name: str) -> None:
    with pytest.raises(ValueError, match=r"keeps running statistics.*batch_norm='task'.*batch_norm='frozen'"):
        functionalize(build(name))


def test_other_choices_raise() -> None:
    mode: Any = "running"
    with pytest.raises(ValueError, match=r"batch_norm='running'; it must be 'task', 'frozen' or None"):
        functionalize(build("resnet10"), batch_norm=mode)
    plain = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(ValueError, match=r"layer '1' .*keeps no statistics that could be frozen.*'task'"):
        functionalize(plain, batch_norm="frozen")


class Own(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


@pytest.mark.parametrize("batch_norm", ["task", "frozen"])
def test_own_layer_is_restored_even_after_an_error(batch_norm: BatchNormMode) -> None:
    module = nn.Sequential(nn.Conv1d(4, 3, 1), Own(3), nn.InstanceNorm1d(3, track_running_stats=True))
    before = {n: b.clone() for n, b in module.named_buffers()}
    forward, theta = functionalize(module, batch_norm=batch_norm)
    with pytest.raises((RuntimeError, ValueError)):
        forward(theta, torch.zeros(2, 9, 5))
    forward(theta, torch.randn(2, 4, 5))
    layer: Any
    for layer in (module[1], module[2]):
        assert layer.training
        assert layer.track_running_stats
    assert all(torch.equal(b, before[n]) for n, b in module.named_buffers())


def test_dropout_and_stochastic_depth_draw_for_every_task() -> None:
    torch.manual_seed(0)
    forward, theta = functionalize(zoo.efficientnet_b0(num_classes=3, dropout=0.5), batch_norm="frozen")
    x = torch.randn(1, 2, 3, 32, 32).expand(6, 2, 3, 32, 32)
    fast = {name: p.expand(6, *p.shape) for name, p in theta.items()}
    assert len(predict(forward, fast, x).unique(dim=0)) == 6


def test_frozen_parts_cost_no_memory_in_the_inner_loop() -> None:
    module, episodes = build("resnet10"), tasks()
    module.requires_grad_(requires_grad=False)
    head: Any = module.fc
    head.requires_grad_(requires_grad=True)

    def peak(steps: int) -> int:
        forward, theta = functionalize(module, batch_norm="frozen")
        assert list(theta) == ["fc.weight", "fc.bias"]
        inner = replace(INNER, steps=steps)
        with PeakTensorMemory() as memory:
            meta_gradient(forward, theta, episodes, inner)
        return memory.peak

    peak(1)
    one_step, more = peak(1), peak(6) - peak(1)
    weights = 4 * sum(p.numel() * p.element_size() for p in head.parameters())
    assert more < 0.1 * one_step
    assert more < 5 * 20 * weights, "of five more steps, what the head's take"


def test_adapted_backbone_predicts_each_query_alone_when_frozen() -> None:
    forward, theta = functionalize(build("resnet10"), batch_norm="frozen")
    episodes = tasks()
    fast = adapt(forward, theta, episodes.support_x, episodes.support_y, INNER)
    together = predict(forward, fast, episodes.query_x)
    alone = torch.cat([predict(forward, fast, episodes.query_x[:, i : i + 1]) for i in range(6)], dim=1)
    torch.testing.assert_close(together, alone)


def test_recorded_statistics_leave_frozen_ones_alone() -> None:
    forward, theta = functionalize(build("resnet10"), batch_norm="frozen")
    episodes = tasks()
    inner = replace(INNER, steps=1)
    fast = adapt(forward, theta, episodes.support_x, episodes.support_y, inner)
    statistics = record_statistics(forward, fast, episodes.query_x)
    assert statistics == [], "none of a batch are taken"
    alone = predict_nontransductive(forward, fast, episodes, statistics)
    torch.testing.assert_close(alone, predict(forward, fast, episodes.query_x))


class Dropping(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


def test_layer_of_ones_own_stays_in_training_mode() -> None:
    forward, theta = functionalize(nn.Sequential(nn.Linear(4, 8), Dropping(8)), batch_norm="task")
    x = torch.randn(5, 4)
    assert not torch.equal(forward(theta, x), forward(theta, x))
