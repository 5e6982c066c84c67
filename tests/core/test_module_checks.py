"""Modules that cannot be pure functions raise by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from metalearn import Episodes, InnerLoop, functionalize, meta_gradient
from tests.core.networks import TASKS, Net, X, chain


class TwoArguments(Net):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x * mask)


def hooked(register: Callable[[Net], object]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        module = Net()
        register(module)
        return module

    return build


def ignore(*args: object) -> None:
    """Do nothing."""


def quantised() -> nn.Module:
    layer = torch.ao.nn.quantized.dynamic.Linear(5, 5) if torch.backends.quantized.supported_engines else None
    return chain(layer) if layer is not None else pytest.skip("this torch has no quantised layers")


STATISTICS = r"layer '1'.*batch_norm='task'.*batch_norm='frozen'"
UNSUPPORTED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "DataParallel": (lambda: nn.DataParallel(Net()), r"the module \(DataParallel\).*model\.module, unwrapped"),
    "inner DataParallel": (lambda: chain(nn.DataParallel(nn.Linear(5, 5))), r"layer '1' \(DataParallel\)"),
    "script": (lambda: torch.jit.script(chain()), r"the module itself, before it is scripted"),
    "trace": (lambda: torch.jit.trace(chain(), X), r"the module itself, before it is scripted"),
    "inner script": (lambda: chain(torch.jit.script(nn.Linear(5, 5))), r"layer '1' .*before it is scripted"),
    "sparse bag": (lambda: chain(nn.EmbeddingBag(9, 5, sparse=True)), r"layer '1' \(EmbeddingBag\).*sparse=False"),
    "max_norm": (lambda: chain(nn.Embedding(9, 5, max_norm=1.0)), r"layer '1' \(Embedding\).*max_norm=1\.0.*without"),
    "lazy": (lambda: chain(nn.LazyLinear(5)), r"parameter '1\.weight' has no shape yet.*one batch.*model\(x\)"),
    "quantised": (quantised, r"layer '1' \(Linear\) is quantised"),
    "full backward hook": (hooked(lambda m: m.a.register_full_backward_hook(ignore)), r"layer 'a' .*gradient hook"),
    "backward pre-hook": (hooked(lambda m: m.b.register_full_backward_pre_hook(ignore)), r"layer 'b' .*gradient hook"),
    "hook of a parameter": (hooked(lambda m: m.a.weight.register_hook(ignore)), r"'a\.weight' has a gradient hook"),
    "hook after accumulation": (
        hooked(lambda m: m.a.bias.register_post_accumulate_grad_hook(ignore)),
        r"parameter 'a\.bias' has a gradient hook, which is never called.*\.remove\(\)",
    ),
    "BatchNorm": (lambda: chain(nn.BatchNorm1d(5)), STATISTICS),
    "InstanceNorm": (lambda: chain(nn.InstanceNorm1d(5, track_running_stats=True)), STATISTICS),
    "no parameter": (nn.ReLU, "ReLU has no trainable parameter.*requires_grad=True"),
}


@pytest.mark.filterwarnings("ignore")  # of torch's own deprecations
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_module_raises(name: str) -> None:
    build, message = UNSUPPORTED[name]
    with pytest.raises(ValueError, match=f"^functionalize: .*{message}"):
        functionalize(build())


def test_frozen_embedding_may_have_sparse_gradients() -> None:
    frozen = nn.Embedding(9, 5, sparse=True).requires_grad_(False)
    forward, theta = functionalize(nn.Sequential(frozen, nn.Linear(5, 3)))
    words, labels = torch.randint(9, (2, 4)), torch.randint(3, (2, 4))
    meta_gradient(forward, theta, Episodes(words, labels, words, labels), InnerLoop(lr=0.1, steps=1))


@pytest.mark.parametrize("module", [TwoArguments(), nn.Bilinear(5, 5, 3), nn.MultiheadAttention(5, 1)])
def test_module_of_several_arguments_raises_on_one(module: nn.Module) -> None:
    forward, theta = functionalize(module)
    with pytest.raises(TypeError, match=rf"{type(module).__name__}\.forward\(.*is given x .*a tuple of its arguments"):
        forward(theta, torch.zeros(2, 5))


def test_forward_hook_is_called() -> None:
    calls: list[object] = []
    forward, theta = functionalize(hooked(lambda m: m.a.register_forward_hook(lambda *args: calls.append(0)))())
    forward(theta, X)
    assert calls


def test_train_mode_set_later_raises() -> None:
    module = chain(nn.BatchNorm1d(5)).eval()
    forward, theta = functionalize(module)
    meta_gradient(forward, theta, TASKS, InnerLoop(lr=0.1, steps=1))
    module.train()  # as a training loop does at the top of each epoch
    with pytest.raises(ValueError, match=STATISTICS):
        meta_gradient(forward, theta, TASKS, InnerLoop(lr=0.1, steps=1))
