"""Training by another library: the same meta-gradient at every theta, and no input is changed."""

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
from metalearn.metagrad.baselines.common import UnsupportedSettingError
from tests.factories import image_episodes
from tests.metagrad.baselines.libraries import LIBRARIES, assert_equal, load_library, mlp, smooth
from tests.metagrad.settings import vectors


def test_backend_names() -> None:
    assert sorted(BACKENDS) == sorted(LIBRARIES)


@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("name", LIBRARIES)
def test_backend_equals_ours_at_every_theta(name: str, second_order: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    load_library(name)
    module, episodes = mlp(), vectors()
    forward, theta = functionalize(module)
    compute = backend(name, module)
    monkeypatch.setattr(copy, "deepcopy", _forbid_modules(copy.deepcopy))  # copied once already
    inner = InnerLoop(0.2, 3, second_order=second_order)
    with torch.no_grad():  # as in a hand-written training loop
        for _ in range(3):
            ours = meta_gradient(forward, theta, episodes, inner)
            assert_equal(compute(theta, episodes, inner), ours)
            theta = {n: p - 0.5 * ours.grads[n] for n, p in theta.items()}


def _forbid_modules(deepcopy: Callable[..., object]) -> Callable[..., object]:
    def forbidding(x: object, *rest: object) -> object:
        assert not isinstance(x, nn.Module), "a module is copied in a meta-step"
        return deepcopy(x, *rest)

    return forbidding


@pytest.mark.parametrize("name", LIBRARIES)
def test_backend_changes_no_input(name: str) -> None:
    load_library(name)
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
def test_learn2learn_backend_learns_rates(second_order: bool) -> None:
    load_library("learn2learn")
    module, episodes = mlp(), vectors()
    forward, theta = functionalize(module)
    inner = InnerLoop(0.2, 3, second_order=second_order, learned_lr="parameter")
    theta = {n: p + 0.02 * torch.randn_like(p) for n, p in with_learned_lrs(theta, inner).items()}
    values = {n: p.clone() for n, p in theta.items()}
    assert_equal(backend("learn2learn", module)(theta, episodes, inner), meta_gradient(forward, theta, episodes, inner))
    assert all(torch.equal(p, values[n]) and not p.requires_grad for n, p in theta.items())


@pytest.mark.parametrize("name", ["higher", "torchopt"])
def test_backend_passes_settings_on(name: str) -> None:
    load_library(name)
    module, episodes = smooth(), vectors()
    forward, theta = functionalize(module)
    inner = InnerLoop(0.05, 3, rule=Adam(eps=1e-2), weight_decay=0.1)
    assert_equal(backend(name, module)(theta, episodes, inner), meta_gradient(forward, theta, episodes, inner))


@pytest.mark.parametrize("name", LIBRARIES)
def test_backend_differentiates_attention_twice(name: str) -> None:
    load_library(name)
    module, episodes = PatchTransformer(3, patch=14, width=8, heads=2).double(), image_episodes(tasks=2)
    forward, theta = functionalize(module)
    inner = InnerLoop(0.1, 2)
    ours = meta_gradient(forward, theta, episodes, inner)
    assert relative_error(backend(name, module)(theta, episodes, inner).grads, ours.grads) < 1e-9


@pytest.mark.parametrize("name", LIBRARIES)
def test_backend_with_custom_loss(name: str) -> None:
    load_library(name)
    module, episodes = mlp(), vectors()
    forward, theta = functionalize(module)
    inner = InnerLoop(0.2, 2)

    def loss(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (prediction - target[:, None]).square().mean()

    ours = meta_gradient(forward, theta, episodes, inner, loss=loss)
    assert_equal(backend(name, module, loss=loss)(theta, episodes, inner), ours)


@pytest.mark.parametrize("name", LIBRARIES)
def test_backend_raises_for_unsupported_setting(name: str) -> None:
    load_library(name)
    module = mlp()
    theta = functionalize(module)[1]
    with pytest.raises(UnsupportedSettingError, match=r"does not offer clip_norm=1\.0"):
        backend(name, module).check_supported(InnerLoop(0.2, 2, clip_norm=1.0))
    with pytest.raises(UnsupportedSettingError, match=r"does not offer clip_norm=1\.0"):
        backend(name, module)(theta, vectors(), InnerLoop(0.2, 2, clip_norm=1.0))
    with pytest.raises(ValueError, match=r"params\['layers\.1\.weight'\] is float32"):
        backend(name, module)({n: p.float() for n, p in theta.items()}, vectors(), InnerLoop(0.2, 2))


def test_backend_raises_when_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "higher", None)  # so that importing it fails
    monkeypatch.delitem(sys.modules, "metalearn.metagrad.baselines.higher", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"library higher is not installed\. Install it with `pip install -r requi"):
        backend("higher", mlp())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(ConfigError, match=r"higher cannot be imported \(.*\)\. .*algorithm\.backend=metalearn, which"):
        backend("higher", mlp())


def test_unknown_backend_raises() -> None:
    with pytest.raises(ConfigError, match=r"backend=lower: must be one of metalearn, learn2learn, higher, torchopt\."):
        backend("lower", mlp())
