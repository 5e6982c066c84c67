"""Training by another library: the same meta-gradient at every theta, and no input is changed."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from metalearn import InnerLoop, Loss, functionalize, meta_gradient
from metalearn.commands.verify.cases import PatchTransformer
from metalearn.core.errors import ConfigError
from metalearn.core.params import relative_error
from metalearn.inner import Adam, with_learned_lrs
from metalearn.metagrad.baselines.backend import backend
from metalearn.metagrad.baselines.common import UnsupportedSettingError
from tests.factories import image_episodes
from tests.metagrad.baselines.libraries import LIBRARIES, load_library, mlp, smooth
from tests.metagrad.settings import assert_equal, vectors


def squared_distance(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (prediction - target[:, None]).square().mean()


Case = tuple[str, Callable[[], nn.Module], dict[str, Any], Loss]
CASES: list[Case] = [
    *[(name, mlp, {}, loss) for name in LIBRARIES for loss in (cross_entropy, squared_distance)],
    ("learn2learn", mlp, {"learned_lr": "parameter"}, cross_entropy),
    *[
        (name, smooth, {"lr": 0.05, "rule": Adam(eps=1e-2), "weight_decay": 0.1}, cross_entropy)
        for name in ("higher", "torchopt")
    ],
]


@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_backend_equals_ours_at_every_theta_and_changes_no_input(
    case: Case, second_order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, model, settings, loss = case
    load_library(name)
    module, episodes = model(), vectors()
    forward, params = functionalize(module)
    inner = InnerLoop(**{"lr": 0.2, "steps": 3, "second_order": second_order, **settings})
    theta = {n: p + 0.02 * torch.randn_like(p) for n, p in with_learned_lrs(params, inner).items()}
    compute = backend(name, module, loss=loss)
    monkeypatch.setattr(copy, "deepcopy", _forbid_modules(copy.deepcopy))  # copied once already
    own = dict(module.named_parameters())
    with torch.no_grad():  # as in a hand-written training loop
        for _ in range(3):
            before = {n: p.clone() for n, p in theta.items()}
            ours = meta_gradient(forward, theta, episodes, inner, loss=loss)
            assert_equal(compute(theta, episodes, inner), ours)
            assert all(torch.equal(p, before[n]) and not p.requires_grad and p.grad is None for n, p in theta.items())
            theta = {n: p - 0.5 * ours.grads[n] for n, p in theta.items()}
    for n, p in module.named_parameters():
        assert p is own[n]
        assert p.grad is None
        assert torch.equal(p, params[n])


def _forbid_modules(deepcopy: Callable[..., object]) -> Callable[..., object]:
    def forbidding(x: object, *rest: object) -> object:
        assert not isinstance(x, nn.Module), "a module is copied in a meta-step"
        return deepcopy(x, *rest)

    return forbidding


@pytest.mark.parametrize("name", LIBRARIES)
def test_backend_differentiates_attention_twice(name: str) -> None:
    load_library(name)
    module, episodes = PatchTransformer(3, patch=14, width=8, heads=2).double(), image_episodes(tasks=2)
    forward, theta = functionalize(module)
    inner = InnerLoop(0.1, 2)
    ours = meta_gradient(forward, theta, episodes, inner)
    assert relative_error(backend(name, module)(theta, episodes, inner).grads, ours.grads) < 1e-9


@pytest.mark.parametrize("name", LIBRARIES)
def test_backend_raises_for_unsupported_setting(name: str) -> None:
    load_library(name)
    module = mlp()
    theta, clipped = functionalize(module)[1], InnerLoop(0.2, 2, clip_norm=1.0)
    for call in (backend(name, module).check_supported, partial(backend(name, module), theta, vectors())):
        with pytest.raises(UnsupportedSettingError, match=r"does not offer clip_norm=1\.0"):
            call(clipped)
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
