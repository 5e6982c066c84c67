"""The kernels against torch's layers, task by task, in float64: values and derivatives to the third order."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import jvp, vjp, vmap
from torch.nn import functional

from metalearn.core.functional import functionalize
from metalearn.core.operations import CorrectedOperations
from metalearn.core.params import relative_error
from metalearn.core.types import Episodes
from metalearn.inner import InnerLoop
from metalearn.metagrad import meta_gradient
from metalearn.metagrad.baselines import by_hand
from metalearn.models import Conv4
from metalearn.models.kernels import STACKED_LAYERS, batch_norm, conv2d, dispatch, relu

_T, _B = 3, 4
_EPS = 1e-3


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _by_task(layer: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Apply torch's layer to one task after the other."""
    return lambda *args: torch.stack([layer(*task) for task in zip(*args, strict=True)])


def _convolution(stride: int, padding: int) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    steps, zeros = (stride, stride), (padding, padding)
    return (
        lambda x, w: conv2d(x, w, stride=steps, padding=zeros),
        _by_task(lambda x, w: functional.conv2d(x, w, stride=steps, padding=zeros)),
    )


def _shared_convolution(stride: int) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    def shared(layer: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, w: layer(x, w.expand(_T, *w.shape))

    ours, theirs = _convolution(stride, 1)
    return shared(ours), shared(theirs)


def _norm() -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    def by_definition(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:  # torch's has two derivatives
        variance, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0, keepdim=True)
        return (x - mean) / (variance + _EPS).sqrt() * gamma.view(-1, 1, 1) + beta.view(-1, 1, 1)

    return lambda x, gamma, beta: batch_norm(x, gamma, beta, _EPS), _by_task(by_definition)


_IMAGES = _random(_T, _B, 2, 6, 5)
_CHANNELS = (1.5 + _random(_T, 2, seed=1).tanh(), _random(_T, 2, seed=2))
CASES = {
    "strided convolution": (_convolution(2, 1), (_IMAGES, _random(_T, 3, 2, 3, 3, seed=3))),
    "convolution": (_convolution(1, 0), (_IMAGES, _random(_T, 3, 2, 3, 2, seed=4))),
    "convolution of one channel": (_convolution(2, 1), (_IMAGES[:, :, :1], _random(_T, 3, 1, 3, 3, seed=5))),
    "convolution with one weight": (_shared_convolution(2), (_IMAGES, _random(3, 2, 3, 3, seed=6))),
    "batch norm": (_norm(), (_IMAGES, *_CHANNELS)),
    "relu": ((relu, torch.relu), (_IMAGES,)),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Any:
    (ours, theirs), inputs = CASES[request.param]
    return ours, theirs, inputs


@pytest.fixture(params=["matrix products", "convolutions", "as on a GPU"])
def _either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 0 if request.param == "convolutions" else 10**6
    # The package has functions of these names.
    modules = [importlib.import_module(f"metalearn.models.kernels.{name}") for name in ("conv2d", "batch_norm")]
    monkeypatch.setattr(modules[0], "_MAX_MATMUL_ROWS", rows)
    if request.param == "as on a GPU":
        for module in modules:
            monkeypatch.setattr(module, "uses_torch_kernels", lambda x: True)


def _same(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("_either_way")
def test_reverse_mode_equals_torch_to_third_order(case: Any) -> None:
    def derivatives(layer: Callable[..., Tensor]) -> list[Tensor]:
        at = [x.clone().requires_grad_() for x in inputs]
        value = layer(*at)
        found, last = [value], [value]
        for order in range(3):
            weights = [_random(*t.shape, seed=10 * order + k) for k, t in enumerate(last)]
            # sin: no derivative vanishes
            total = torch.stack([(w * t.sin()).sum() for w, t in zip(weights, last, strict=True)]).sum()
            last = list(torch.autograd.grad(total, at, create_graph=True, materialize_grads=True))
            found += last
        return found

    ours, theirs, inputs = case
    _same(derivatives(ours), derivatives(theirs))


@pytest.mark.usefixtures("_either_way")
def test_forward_and_mixed_modes_equal_torch(case: Any) -> None:
    def derivatives(layer: Callable[..., Tensor]) -> list[Any]:
        along = tuple(_random(*x.shape, seed=20 + k) for k, x in enumerate(inputs))

        def gradient(*at: Tensor) -> Any:
            value, pull, *_ = vjp(lambda *a: layer(*a).sin(), *at)
            return pull(_random(*value.shape, seed=30))

        pushed = jvp(lambda *a: layer(*a).sin(), inputs, along)
        curved = jvp(gradient, inputs, along)
        total, pull, *_ = vjp(lambda *a: sum(g.square().sum() for g in jvp(gradient, a, along)[1]), *inputs)
        return [pushed, curved, total, pull(torch.ones_like(total))]

    ours, theirs, inputs = case
    _same(derivatives(ours), derivatives(theirs))


@pytest.mark.usefixtures("_either_way")
def test_vmap_with_and_without_shared_arguments(case: Any) -> None:
    ours, theirs, inputs = case
    more = torch.stack([inputs[0], 2 * inputs[0].roll(1, 1)])
    for dims in [(0, *[None] * (len(inputs) - 1)), tuple(0 for _ in inputs)]:
        args = [more, *(x if d is None else torch.stack([x, -x]) for x, d in zip(inputs[1:], dims[1:], strict=True))]
        looped = [
            theirs(*(x if d is None else x[k] for x, d in zip(args, dims, strict=True))) for k in range(len(more))
        ]
        _same(vmap(ours, in_dims=dims)(*args), torch.stack(looped))


class _User(nn.Module):
    """A user's model: layers that the kernels support and others, of which some write to outputs of kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = (nn.Conv2d(n, 4, 3, padding=1, bias=n == 1) for n in (1, 4))
        self.narrow = nn.Conv2d(4, 4, (3, 2), stride=(2, 1), bias=False)
        self.dilated = nn.Conv2d(4, 4, 3, dilation=2, padding="same", groups=2)
        self.norm, self.last_norm = (nn.BatchNorm2d(4, track_running_stats=False) for _ in range(2))
        self.plain = nn.BatchNorm2d(4, affine=False, track_running_stats=False)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.narrow(self.relu(self.norm(self.first(x)))))
        x = torch.relu(self.plain(self.dilated(x)))
        y = self.last_norm(functional.conv2d(input=x, weight=self.last.weight, padding=1))
        y += x
        return self.head(self.relu(y).mean(dim=(-2, -1)))


MODELS = {
    "conv4": lambda: Conv4(3, width=4),
    "conv4 with max-pooling": lambda: Conv4(3, width=4, pool="max"),
    "a model of the user's": _User,
}


_LABELS = torch.arange(3).repeat(_T, 2)
EPISODES = Episodes(_random(_T, 6, 1, 16, 16, seed=40), _LABELS, _random(_T, 6, 1, 16, 16, seed=41), _LABELS)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the kernels that are called, as they are."""
    names: list[str] = []

    def record(name: str, kernel: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        names.append(name)
        return kernel(*args, **kwargs)

    for name in ("conv2d", "batch_norm", "relu"):
        monkeypatch.setattr(dispatch, name, partial(record, name, getattr(dispatch, name)))
    return names


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("second_order", [True, False])
def test_meta_gradient_is_equal_with_and_without_kernels(
    name: str, second_order: bool, called: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, theta = functionalize(MODELS[name]().double())
    inner = InnerLoop(lr=0.2, steps=2, second_order=second_order)
    with_them = meta_gradient(lambda p, x: forward(p, x), theta, EPISODES, inner)
    assert {"conv2d", "batch_norm", "relu"} == set(called)
    directly = meta_gradient(forward, theta, EPISODES, inner)
    monkeypatch.setattr(dispatch, "_supports", lambda *tensors: False)
    called.clear()
    without = meta_gradient(lambda p, x: forward(p, x), theta, EPISODES, inner)
    assert not called
    for result in (with_them, directly):
        assert relative_error(result.grads, without.grads) < 1e-12
        _same(result.predictions, without.predictions)


def call_by_task(module: nn.Module, x: Tensor, in_dims: Any = 0) -> Any:
    """Call a module with the same weights for every task, stacked, as ``vmap`` batches them."""
    weights = {name: p.expand(len(x), *p.shape) for name, p in module.named_parameters()}
    return vmap(lambda p, x: torch.func.functional_call(module, p, (x,)), in_dims)(weights, x)


def test_unbatched_layers_use_torch(called: list[str]) -> None:
    x, module = torch.randn(2, 1, 8, 8), nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
    with CorrectedOperations(kernels=STACKED_LAYERS):
        module(x)
        vmap(module)(x.unsqueeze(0))  # the examples are batched, the weights are not
        with torch.autocast("cpu", dtype=torch.bfloat16):
            call_by_task(module, x, (0, None))
    assert called == ["relu"]  # of the batched examples


@pytest.mark.parametrize(
    ("layer", "x", "error", "message"),
    [
        (nn.Conv2d(1, 2, 5), torch.randn(_T, 2, 1, 3, 3), RuntimeError, r"[Kk]ernel size"),
        (
            nn.BatchNorm2d(2, track_running_stats=False),
            torch.randn(_T, 1, 2, 1, 1),
            ValueError,
            "more than 1 value per channel",
        ),
    ],
)
def test_invalid_input_raises_as_in_torch(layer: nn.Module, x: Tensor, error: type[Exception], message: str) -> None:
    with CorrectedOperations(kernels=STACKED_LAYERS), pytest.raises(error, match=message):
        call_by_task(layer, x)


def _edited(edit: Callable[[Conv4], object]) -> Conv4:
    model = Conv4(3, width=4)
    edit(model)
    return model


class _Scaled(Conv4):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


EDITED: dict[str, Callable[[], nn.Module]] = {
    "a subclass": lambda: _Scaled(3, width=4),
    "another activation": lambda: _edited(lambda m: setattr(m.features[0], "2", nn.LeakyReLU())),
    "another eps": lambda: _edited(lambda m: setattr(m.get_submodule("features.0.1"), "eps", 0.1)),
    "a hook": lambda: _edited(lambda m: m.head.register_forward_hook(lambda layer, x, y: y.square())),
    "frozen features": lambda: _edited(lambda m: m.features.requires_grad_(False)),
    "a head without bias": lambda: _edited(lambda m: setattr(m, "head", nn.Linear(4, 3, bias=False))),
    "layers in place": _User,
}


@pytest.mark.parametrize("name", EDITED)
def test_edited_model_equals_its_loop(name: str) -> None:
    module = EDITED[name]().double()
    inner = InnerLoop(lr=0.2, steps=2)
    expected = by_hand.meta_gradient(module, EPISODES, inner)
    got = meta_gradient(*functionalize(module), EPISODES, inner)
    assert relative_error(got.grads, {n: expected.grads[n] for n in got.grads}) < 1e-11
    _same(got.predictions, expected.predictions)


def test_loss_may_draw_random_numbers() -> None:
    forward, theta = functionalize(Conv4(3, width=4).double())

    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(functional.dropout(prediction, 0.5), target)

    assert meta_gradient(forward, theta, EPISODES, InnerLoop(lr=0.1, steps=1), loss=loss).loss.isfinite()


def test_unsupported_nested_modes_raise_or_use_torch() -> None:
    x, w = _IMAGES, _random(_T, 3, 2, 3, 3, seed=3)
    ours: Callable[..., Tensor] = CASES["convolution"][0][0]

    def second(layer: Callable[..., Tensor]) -> Any:
        along = (torch.ones_like(x),)
        return jvp(lambda x: jvp(lambda x: layer(x, w).sin(), (x,), along)[1], (x,), along)[1]

    with pytest.raises(NotImplementedError, match="forward-mode AD within forward-mode AD"):
        second(ours)
    with CorrectedOperations(kernels=STACKED_LAYERS):
        within = second(lambda x, w: vmap(functional.conv2d)(x, w))
    _same(within, second(lambda x, w: vmap(functional.conv2d)(x, w)))

    at = x.clone().requires_grad_()
    value = ours(at, w)
    with pytest.raises(NotImplementedError, match="is_grads_batched"):
        torch.autograd.grad(value, at, torch.ones(2, *value.shape, dtype=x.dtype), is_grads_batched=True)


def test_double_backward_of_dual_tensors_equals_torch() -> None:
    (ours, theirs), (x, gamma, beta) = CASES["batch norm"]

    def curvature(layer: Callable[..., Tensor], create_graph: bool) -> tuple[Tensor, Tensor]:
        with forward_ad.dual_level():
            at = forward_ad.make_dual(x.clone().requires_grad_(), torch.ones_like(x).cumsum(-1))
            (g,) = torch.autograd.grad(layer(at, gamma, beta).sin().sum(), at, create_graph=True)
            (h,) = torch.autograd.grad(g.square().sum(), at, create_graph=create_graph)
            primal, tangent = forward_ad.unpack_dual(h)
            assert tangent is not None
            return primal.detach(), tangent.detach()

    _same(curvature(ours, False), curvature(theirs, True))
