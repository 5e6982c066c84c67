"""Modules as pure functions of their parameters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from metalearn import Episodes, InnerLoop, Params, adapt, functionalize, meta_gradient, predict
from metalearn.core.functional import check_params, expand_over_tasks, global_norm, grad_of
from metalearn.models import Conv4


def test_forward_equals_the_module() -> None:
    module = Conv4(5, width=8)
    x = torch.rand(10, 1, 28, 28)
    forward, theta = functionalize(module)
    torch.testing.assert_close(forward(theta, x), module(x), rtol=0, atol=0)


def test_params_are_copies() -> None:
    module = nn.Linear(2, 2)
    before = module.weight.detach().clone()
    forward, theta = functionalize(module)
    theta["weight"].zero_()
    torch.testing.assert_close(module.weight.detach(), before, rtol=0, atol=0)
    assert forward(theta, torch.ones(1, 2)).tolist() == [module.bias.tolist()]


class Scaled(nn.Module):
    """A module of a frozen layer, a buffer and a trainable layer."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(3, 3)
        self.frozen.requires_grad_(False)
        self.register_buffer("scale", torch.tensor(2.0))
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.frozen(x) * self.scale)
        return logits


def test_frozen_parameters_and_buffers_are_constants() -> None:
    module = Scaled()
    forward, theta = functionalize(module)
    assert set(theta) == {"head.weight", "head.bias"}
    x = torch.randn(4, 3)
    torch.testing.assert_close(forward(theta, x), module.head(module.frozen(x) * 2.0))


class Counting(nn.Module):
    """A module that writes to a buffer in its forward pass."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        prediction: Tensor = self.linear(x) * self.calls
        return prediction


def test_buffer_writes_do_not_change_the_module() -> None:
    module = Counting()
    forward, theta = functionalize(module)
    first, second = (forward(theta, torch.ones(1, 2)) for _ in range(2))
    assert torch.equal(first, second)
    torch.vmap(forward)({name: p.expand(3, *p.shape) for name, p in theta.items()}, torch.ones(3, 1, 2))
    assert module.calls == 0


def test_constants_move_with_the_module() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()
    forward, theta = functionalize(module)
    module.double()
    moved = {name: p.double() for name, p in theta.items()}
    assert forward(moved, torch.ones(3, 2, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(4), nn.InstanceNorm2d(4, track_running_stats=True)])
def test_running_statistics_raise_with_remedies(layer: nn.Module) -> None:
    module = nn.Sequential(nn.Conv2d(1, 4, 3), layer)
    with pytest.raises(ValueError, match=r"layer '1'.*track_running_stats=False.*model\.eval\(\)"):
        functionalize(module)


def test_remedies_for_running_statistics_work() -> None:
    x = torch.rand(2, 1, 8, 8)
    evaluated = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)).eval()
    forward, theta = functionalize(evaluated)
    torch.testing.assert_close(forward(theta, x), evaluated(x))
    converted = torch.func.replace_all_batch_norm_modules_(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)))
    functionalize(converted)
    functionalize(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)))


def test_module_without_trainable_parameters_raises() -> None:
    with pytest.raises(ValueError, match=r"ReLU has no trainable parameter.*requires_grad=True"):
        functionalize(nn.ReLU())


class Pair(nn.Linear):
    """A layer that returns two tensors."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x), x


def test_forward_raises_when_module_returns_a_tuple() -> None:
    forward, theta = functionalize(Pair(2, 2))
    with pytest.raises(TypeError, match="Pair returns tuple and must return one tensor of predictions"):
        forward(theta, torch.zeros(1, 2))


def test_forward_raises_on_unknown_names() -> None:
    forward, theta = functionalize(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"params names 'wieght', which Linear does not have; it has bias, weight"):
        forward({"wieght": theta["weight"], "bias": theta["bias"]}, torch.zeros(1, 2))
    forward({"bias": theta["bias"]}, torch.zeros(1, 2))  # the module's own weight is a constant then


@pytest.mark.parametrize("params", [None, [torch.zeros(2)], nn.Linear(2, 2), "theta"])
def test_params_must_be_a_dictionary(params: object) -> None:
    with pytest.raises(TypeError, match=rf"params is {type(params).__name__} and must be a dictionary of tensors"):
        check_params(params)  # type: ignore[arg-type]


def test_params_on_meta_device_raise() -> None:
    with pytest.raises(ValueError, match=r"params\['w'\] is on the meta device and holds no values"):
        check_params({"w": torch.zeros(2, device="meta")})


def test_tied_parameters_appear_once() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    forward, theta = functionalize(module)
    assert set(theta) == {"0.weight", "0.bias", "1.bias"}
    doubled = {**theta, "0.weight": 2 * theta["0.weight"]}
    x = torch.randn(2, 3)
    expected = (x @ doubled["0.weight"].T + theta["0.bias"]) @ doubled["0.weight"].T + theta["1.bias"]
    torch.testing.assert_close(forward(doubled, x), expected)
    by_its_other_name = {"1.weight": doubled["0.weight"], "0.bias": theta["0.bias"], "1.bias": theta["1.bias"]}
    torch.testing.assert_close(forward(by_its_other_name, x), expected)


def test_expand_over_tasks_is_a_differentiable_view() -> None:
    theta = {"w": torch.randn(2, 3, requires_grad=True)}
    fast = expand_over_tasks(theta, 5)["w"]
    assert fast.shape == (5, 2, 3)
    assert fast.data_ptr() == theta["w"].data_ptr()
    fast.sum().backward()
    assert theta["w"].grad is not None
    assert theta["w"].grad.eq(5).all()


def test_grad_of_dictionary() -> None:
    params: Params = {"a": torch.tensor(3.0, requires_grad=True), "b": torch.tensor(2.0, requires_grad=True)}
    grads = grad_of(params["a"] ** 2, params, create_graph=True)
    assert grads["a"].item() == 6
    assert grads["a"].grad_fn is not None
    assert grads["b"].item() == 0


def test_global_norm() -> None:
    assert global_norm({"a": torch.tensor([3.0]), "b": torch.tensor([[0.0, 4.0]])}).item() == 5


def test_complex_parameters_raise_with_remedy() -> None:
    with pytest.raises(TypeError, match=r"params\['w'\] is torch\.complex64.*view_as_real.*view_as_complex") as caught:
        check_params({"w": torch.zeros(2, dtype=torch.complex64)})
    assert ".float()" not in str(caught.value)


def test_module_instead_of_forward_raises() -> None:
    module, x, y = nn.Linear(3, 2), torch.randn(2, 4, 3), torch.zeros(2, 4, dtype=torch.int64)
    _, theta = functionalize(module)
    fast = {name: p.expand(2, *p.shape) for name, p in theta.items()}
    for call in (
        lambda: meta_gradient(module, theta, Episodes(x, y, x, y), InnerLoop(lr=0.1, steps=1)),
        lambda: adapt(module, theta, x, y, InnerLoop(lr=0.1, steps=1)),
        lambda: predict(module, fast, x),
    ):
        with pytest.raises(TypeError, match=r"^forward is Linear .*functionalize\(model\)"):
            call()
