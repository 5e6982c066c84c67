"""Training through a peer: the same meta-gradient at every theta, and nothing that is given is changed."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn

from metalearn import InnerLoop, functionalize, meta_gradient
from metalearn.commands.verify.cases import PatchTransformer
from metalearn.core.errors import ConfigError
from metalearn.core.functional import relative_error
from metalearn.inner import Adam, with_learned_lrs
from metalearn.metagrad.baselines.backend import BACKENDS, backend
from metalearn.metagrad.baselines.offers import UnsupportedSettingError
from tests.factories import image_episodes
from tests.metagrad.baselines.libraries import LIBRARIES, peer_at
from tests.metagrad.baselines.test_settings import assert_equal, mlp, smooth
from tests.metagrad.settings import vectors


def test_names() -> None:
    assert sorted(BACKENDS) == sorted(LIBRARIES)


@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("name", LIBRARIES)
def test_equals_ours_at_every_theta(name: str, second_order: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    peer_at(name)
    module, episodes = mlp(), vectors()
    forward, theta = functionalize(module)
    compute = backend(name, module)
    monkeypatch.setattr(copy, "deepcopy", _refuse_modules(copy.deepcopy))  # once was enough
    inner = InnerLoop(0.2, 3, second_order=second_order)
    with torch.no_grad():  # as a training may be that takes its steps by itself
        for _ in range(3):
            ours = meta_gradient(forward, theta, episodes, inner)
            assert_equal(compute(theta, episodes, inner), ours)
            theta = {n: p - 0.5 * ours.grads[n] for n, p in theta.items()}


def _refuse_modules(deepcopy: Callable[..., object]) -> Callable[..., object]:
    def refusing(x: object, *rest: object) -> object:
        assert not isinstance(x, nn.Module), "a module is copied in a meta-step"
        return deepcopy(x, *rest)

    return refusing


@pytest.mark.parametrize("name", LIBRARIES)
def test_nothing_that_is_given_is_changed(name: str) -> None:
    peer_at(name)
    module, episodes = mlp(), vectors()
    theta = {n: p + 0.1 for n, p in functionalize(module)[1].items()}
    values = {n: p.clone() for n, p in theta.items()}
    own = {n: (p, p.detach().clone()) for n, p in module.named_parameters()}
    backend(name, module)(theta, episodes, InnerLoop(0.2, 2))
    assert all(torch.equal(p, values[n]) and not p.requires_grad and p.grad is None for n, p in theta.items())
    for n, p in module.named_parameters():
        same, value = own[n]
        assert p is same
        assert p.grad is None
        assert torch.equal(p, value)


@pytest.mark.parametrize("second_order", [True, False])
def test_rates_are_learned_through_learn2learn(second_order: bool) -> None:
    peer_at("learn2learn")
    module, episodes = mlp(), vectors()
    forward, theta = functionalize(module)
    inner = InnerLoop(0.2, 3, second_order=second_order, learned_lr="parameter")
    theta = {n: p + 0.02 * torch.randn_like(p) for n, p in with_learned_lrs(theta, inner).items()}
    values = {n: p.clone() for n, p in theta.items()}
    assert_equal(backend("learn2learn", module)(theta, episodes, inner), meta_gradient(forward, theta, episodes, inner))
    assert all(torch.equal(p, values[n]) and not p.requires_grad for n, p in theta.items())


@pytest.mark.parametrize("name", ["higher", "torchopt"])
def test_the_settings_go_through(name: str) -> None:
    peer_at(name)
    module, episodes = smooth(), vectors()
    forward, theta = functionalize(module)
    inner = InnerLoop(0.05, 3, rule=Adam(eps=1e-2), weight_decay=0.1)
    assert_equal(backend(name, module)(theta, episodes, inner), meta_gradient(forward, theta, episodes, inner))


@pytest.mark.parametrize("name", LIBRARIES)
def test_attention_has_a_second_derivative(name: str) -> None:
    peer_at(name)
    module, episodes = PatchTransformer(3, patch=14, width=8, heads=2).double(), image_episodes(tasks=2)
    forward, theta = functionalize(module)
    inner = InnerLoop(0.1, 2)
    ours = meta_gradient(forward, theta, episodes, inner)
    assert relative_error(backend(name, module)(theta, episodes, inner).grads, ours.grads) < 1e-9


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_loss_of_ones_own(name: str) -> None:
    peer_at(name)
    module, episodes = mlp(), vectors()
    forward, theta = functionalize(module)
    inner = InnerLoop(0.2, 2)

    def loss(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (prediction - target[:, None]).square().mean()

    ours = meta_gradient(forward, theta, episodes, inner, loss=loss)
    assert_equal(backend(name, module, loss=loss)(theta, episodes, inner), ours)


@pytest.mark.parametrize("name", LIBRARIES)
def test_what_is_not_offered_is_refused(name: str) -> None:
    peer_at(name)
    module = mlp()
    theta = functionalize(module)[1]
    with pytest.raises(UnsupportedSettingError, match=r"does not offer clip_norm=1\.0"):
        backend(name, module)(theta, vectors(), InnerLoop(0.2, 2, clip_norm=1.0))
    with pytest.raises(ValueError, match=r"params\['layers\.1\.weight'\] is float32"):
        backend(name, module)({n: p.float() for n, p in theta.items()}, vectors(), InnerLoop(0.2, 2))


def test_a_backend_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "higher", None)  # so that importing it says that there is none
    monkeypatch.delitem(sys.modules, "metalearn.metagrad.baselines.higher", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"library higher is not installed\. Install it with `pip install -r requi"):
        backend("higher", mlp())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(ConfigError, match=r"higher cannot be imported \(.*\)\. .*algorithm\.backend=metalearn, which"):
        backend("higher", mlp())


def test_a_backend_that_there_is_not() -> None:
    with pytest.raises(ConfigError, match=r"backend=lower: must be one of metalearn, learn2learn, higher, torchopt\."):
        backend("lower", mlp())
