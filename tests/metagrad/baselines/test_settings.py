"""Every setting of the inner loop through every peer, in float64: the same numbers, or a refusal."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metalearn import Episodes, InnerLoop, MetaGradient, Params, functionalize, meta_gradient
from metalearn.core.functional import relative_error
from metalearn.inner import SGD, Adam, Momentum, with_learned_lrs
from metalearn.metagrad.baselines.offers import UnsupportedSettingError, check_supported
from metalearn.models import MLP
from tests.metagrad.baselines.libraries import LIBRARIES, PeerAt, peer_at
from tests.metagrad.settings import BODY, HEAD, SETTINGS, family, vectors

RULES = ["momentum", "nesterov", "adam", "weight decay"]
OFFERED = {
    "learn2learn": {"rates of parameters", "head alone", "body alone, learned rates"},
    "higher": {*RULES},
    "torchopt": {*RULES},
    "by_hand": set(),
}
# A bias before BatchNorm has a gradient of 0, where TorchOpt's Adam gives NaN: see MORE, on another network.
SETTINGS_OF_PEERS = [(name, s) for name in OFFERED for s in SETTINGS if (name, s) != ("torchopt", "adam")]
MORE: dict[str, Mapping[str, Any]] = {
    **{setting: SETTINGS[setting] for setting in RULES},
    "Adam with the usual betas": {"rule": Adam(eps=1e-3), "lr": 0.02},  # 1 - 0.999 is exact in no float32
    "Adam with weight decay": {"rule": Adam(betas=(0.7, 0.9), eps=1e-2), "lr": 0.05, "weight_decay": 0.3},
    "momentum with weight decay": {"rule": Momentum(0.8), "weight_decay": 0.3},
    "Nesterov's of no momentum": {"rule": Momentum(0.0, nesterov=True)},
}


def mlp() -> nn.Module:
    return MLP(4, 3, hidden=(6,)).double()


def smooth() -> nn.Module:
    """No entry of its gradients is 0."""
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def assert_equal(theirs: MetaGradient, ours: MetaGradient, *, within: float = 1e-9) -> None:
    assert list(theirs.grads) == list(ours.grads)
    assert relative_error(theirs.grads, ours.grads) < within
    for name, g in ours.grads.items():  # learned rates, of which gradients are small, by themselves
        torch.testing.assert_close(theirs.grads[name], g, rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(theirs.loss, ours.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(theirs.support_loss, ours.support_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(theirs.predictions, ours.predictions)


@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize(("name", "setting"), SETTINGS_OF_PEERS)
def test_a_setting_is_equal_or_refused(name: str, setting: str, second_order: bool) -> None:
    peer = peer_at(name)
    forward, theta, inner = family(setting, second_order=second_order)
    episodes = vectors()
    if setting in OFFERED[name]:
        ours = meta_gradient(forward, theta, episodes, inner)
        assert_equal(peer(mlp(), episodes, inner, params=theta), ours)
        other_order = dataclasses.replace(inner, second_order=not second_order)
        assert relative_error(peer(mlp(), episodes, other_order, params=theta).grads, ours.grads) > 1e-3
    else:
        with pytest.raises(UnsupportedSettingError, match=r"does not offer \w+=.*; it offers plain gradient steps"):
            peer(mlp(), episodes, inner, params=theta)


@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("setting", MORE)
@pytest.mark.parametrize("name", ["higher", "torchopt"])
def test_rules_are_equal(name: str, setting: str, second_order: bool) -> None:
    peer = peer_at(name)
    module, episodes = smooth(), vectors()
    inner = InnerLoop(**{"lr": 0.2, "steps": 3, "second_order": second_order, **MORE[setting]})
    assert_equal(peer(module, episodes, inner), meta_gradient(*functionalize(module), episodes, inner))


@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("name", ["by_hand", *LIBRARIES])
def test_plain_steps_at_a_given_theta(name: str, second_order: bool) -> None:
    peer = peer_at(name)
    module, episodes = mlp(), vectors()
    forward, theta = functionalize(module)
    theta = {n: p + 0.1 for n, p in reversed(theta.items())}  # neither the module's values nor its order
    inner = InnerLoop(0.2, 3, second_order=second_order)
    before = {n: p.clone() for n, p in (*theta.items(), *module.named_parameters())}
    assert_equal(peer(module, episodes, inner, params=theta), meta_gradient(forward, theta, episodes, inner))
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in module.named_parameters())
    assert not any(p.requires_grad for p in theta.values())


class Late(nn.Module):
    """A shift that only sets of 9 examples, the query sets, are given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.shift = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x)
        return out + self.shift if len(x) == 9 else out


@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("name", ["higher", "torchopt"])
def test_what_the_support_loss_does_not_reach_decays_too(name: str, second_order: bool) -> None:
    peer = peer_at(name)
    module, episodes = Late().double(), vectors()
    inner = InnerLoop(0.2, 3, second_order=second_order, rule=Momentum(0.5), weight_decay=0.5)
    assert_equal(peer(module, episodes, inner), meta_gradient(*functionalize(module), episodes, inner))


def dead_input(episodes: Episodes) -> Episodes:
    return dataclasses.replace(episodes, support_x=episodes.support_x * torch.tensor([0.0, 1, 1, 1]))


def test_adam_at_gradients_of_zero() -> None:
    """Ours takes the derivative of sqrt at 0 for 0, as higher does; TorchOpt's is NaN, as its docstring says."""
    module, episodes = nn.Linear(4, 3).double(), dead_input(vectors())
    inner = InnerLoop(0.05, 3, rule=Adam(betas=(0.7, 0.9), eps=1e-2))
    ours = meta_gradient(*functionalize(module), episodes, inner)
    assert_equal(peer_at("higher")(module, episodes, inner), ours)
    assert peer_at("torchopt")(module, episodes, inner).grads["weight"].isnan().any()


@dataclasses.dataclass(frozen=True)
class Reversed(SGD):
    def __call__(self, k: int, grads: Params, state: Params) -> tuple[Params, Params]:
        return {n: -g for n, g in grads.items()}, state


@dataclasses.dataclass(frozen=True)
class Heavier(Momentum):
    pass


@pytest.mark.parametrize("rule", [Reversed(), Heavier()])
@pytest.mark.parametrize("name", OFFERED)
def test_a_rule_of_ones_own_is_refused(name: str, rule: SGD | Momentum) -> None:
    peer = peer_at(name)
    with pytest.raises(UnsupportedSettingError, match=rf"does not offer rule={type(rule).__name__}\("):
        peer(mlp(), vectors(), InnerLoop(0.2, 3, rule=rule))


def test_a_refusal_says_what_is_offered() -> None:
    offers = {"rule": (SGD, Momentum), "learned_lr": ("parameter",), "adapted": None}
    check_supported("theirs", InnerLoop(0.2, 3, rule=Momentum(), learned_lr="parameter", adapted=HEAD), offers=offers)
    with pytest.raises(UnsupportedSettingError) as raised:
        check_supported("theirs", InnerLoop(0.2, 3, learned_lr="layer"), offers=offers)
    assert str(raised.value) == (
        "theirs does not offer learned_lr='layer'; it offers plain gradient steps and rule=SGD or Momentum and "
        "learned_lr='parameter' and adapted. Leave it out, or take metalearn's own engines "
        "(algorithm.backend=metalearn), which offer all."
    )


def test_every_setting_is_computed_refused_or_without_meaning() -> None:
    """A setting that InnerLoop gets tomorrow is refused until a peer says that it offers it."""
    offers = {"rule": (SGD,)}
    elsewhere = {"second_order": False, "engine": "adjoint", "task_chunk": 2, "snapshot_every": 2}
    check_supported("theirs", InnerLoop(0.3, 5, **elsewhere), offers=offers)  # type: ignore[arg-type]
    refused = {
        "rule": Adam(),
        "learned_lr": "layer",
        "weight_decay": 0.1,
        "clip_norm": 1.0,
        "proximal": 0.1,
        "adapted": HEAD,
        "query_weights": (1.0, 1.0),
        "per_step": BODY,
        "start": lambda forward, fast, x, y: fast,
    }
    assert refused.keys() | elsewhere.keys() | {"lr", "steps"} == {f.name for f in dataclasses.fields(InnerLoop)}
    for setting, value in refused.items():
        with pytest.raises(UnsupportedSettingError, match=f"theirs does not offer {setting}="):
            check_supported("theirs", InnerLoop(0.2, 1, **{setting: value}), offers=offers)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", OFFERED)
def test_a_theta_that_is_not_the_modules_is_refused(name: str) -> None:
    peer: PeerAt = peer_at(name)
    module, episodes, inner = mlp(), vectors(), InnerLoop(0.2, 2)
    _, theta = functionalize(module)
    head = theta.pop("layers.4.weight")
    with pytest.raises(ValueError, match=r"params lacks layers\.4\.weight; the module's trainable parameters are lay"):
        peer(module, episodes, inner, params=theta)
    with pytest.raises(ValueError, match=r"params has heads; the module's"):
        peer(module, episodes, inner, params={**theta, "layers.4.weight": head, "heads": head})
    with pytest.raises(ValueError, match=r"weight'\] is float32 \[3, 6\] on cpu, and the module's is float64 \[3, 6\]"):
        peer(module, episodes, inner, params={**theta, "layers.4.weight": head.float()})
    with pytest.raises(ValueError, match=r"is float64 \[1, 6\] on cpu, and the module's is float64 \[3, 6\] on cpu"):
        peer(module, episodes, inner, params={**theta, "layers.4.weight": head[:1]})
    rates = with_learned_lrs({**theta, "layers.4.weight": head}, InnerLoop(0.2, 2, learned_lr="layer"))
    with pytest.raises(ValueError, match=r"params has lr::layers"):
        peer(module, episodes, inner, params=rates)
