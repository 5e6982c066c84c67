"""The same weights and tasks through higher's differentiable SGD and TorchOpt's functional one, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from metalearn import InnerLoop, functionalize, meta_gradient
from metalearn.core.functional import relative_error
from tests.factories import image_episodes
from tests.metagrad.baselines.libraries import LIBRARIES, PeerAt, peer_at
from tests.metagrad.models import MODELS


@pytest.fixture(params=["higher", "torchopt"])
def peer(request: pytest.FixtureRequest) -> PeerAt:
    """Skips where the library is missing; on CI that is a failure."""
    return peer_at(request.param)


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("model", ["conv4", "mlp"])
def test_equals_the_peer(peer: PeerAt, model: str, second_order: bool, steps: int) -> None:
    module = MODELS[model]().double()
    episodes = image_episodes()
    inner = InnerLoop(lr=0.1, steps=steps, second_order=second_order)

    ours = meta_gradient(*functionalize(module), episodes, inner)
    theirs = peer(module, episodes, inner)

    assert relative_error(ours.grads, theirs.grads) < 1e-9
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.support_loss, theirs.support_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.predictions, theirs.predictions)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("model", ["conv4", "mlp"])
def test_orders_differ(peer: PeerAt, model: str, steps: int) -> None:
    module = MODELS[model]().double()
    episodes = image_episodes()

    second = peer(module, episodes, InnerLoop(lr=0.1, steps=steps, second_order=True))
    first = peer(module, episodes, InnerLoop(lr=0.1, steps=steps, second_order=False))

    assert relative_error(first.grads, second.grads) > 1e-3  # their difference is lr * H * lam, not rounding
    torch.testing.assert_close(first.predictions, second.predictions)


@pytest.mark.parametrize("second_order", [True, False])
def test_frozen_parameters_stay_constant(peer: PeerAt, second_order: bool) -> None:
    module = MODELS["mlp"]().double()
    frozen, _ = next(module.named_parameters())
    module.get_parameter(frozen).requires_grad_(False)
    episodes = image_episodes()
    inner = InnerLoop(lr=0.1, steps=3, second_order=second_order)

    ours = meta_gradient(*functionalize(module), episodes, inner)
    theirs = peer(module, episodes, inner)

    assert frozen not in theirs.grads
    assert theirs.grads.keys() == ours.grads.keys()
    assert relative_error(ours.grads, theirs.grads) < 1e-9


@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("name", ["by_hand", *LIBRARIES])
def test_module_comes_back_unchanged(name: str, second_order: bool) -> None:
    # In training mode this BatchNorm writes its running statistics in every forward pass.
    linear = nn.Linear(28 * 28, 3)
    module = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(28 * 28), linear).double()
    linear.weight.grad = torch.rand_like(linear.weight)
    parameters = dict(module.named_parameters())
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in parameters.items()}
    values = {name: value.clone() for name, value in module.state_dict().items()}

    peer_at(name)(module, image_episodes(), InnerLoop(lr=0.1, steps=3, second_order=second_order))

    assert all(p is parameters[name] for name, p in module.named_parameters())
    assert all(torch.equal(value, values[name]) for name, value in module.state_dict().items())
    for name, grad in grads.items():
        assert parameters[name].requires_grad
        found = parameters[name].grad
        assert found is None if grad is None else found is not None and torch.equal(found, grad)
