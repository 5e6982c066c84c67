"""Every setting of the inner loop by every library, in float64: the same numbers, or an error."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metalearn import InnerLoop, functionalize, meta_gradient
from metalearn.core.params import relative_error
from metalearn.inner import SGD, Adam, MetaCurvature, Momentum, with_learned_lrs
from metalearn.metagrad.baselines.common import UnsupportedSettingError, check_supported
from tests.metagrad.baselines.libraries import LIBRARIES, load_library, mlp, smooth
from tests.metagrad.settings import BODY, HEAD, SETTINGS, assert_equal, model_with_setting, vectors

RULES = ["momentum", "nesterov", "dampening", "adam", "weight decay"]
SUPPORTED = {
    "learn2learn": {"rates of parameters", "head alone", "body alone, learned rates"},
    "higher": {*RULES},
    "torchopt": {*RULES},
    "by_hand": set(),
    "torch_func": set(),
}
# A bias before BatchNorm has a gradient of 0, where TorchOpt's Adam gives NaN: see MORE, on another network.
LIBRARY_SETTINGS = [(name, s) for name in SUPPORTED for s in SETTINGS if (name, s) != ("torchopt", "adam")]
MORE: dict[str, Mapping[str, Any]] = {
    **{setting: SETTINGS[setting] for setting in RULES},
    "Adam with the usual betas": {"rule": Adam(eps=1e-3), "lr": 0.02},  # 1 - 0.999 is exact in no float32
    "Adam with weight decay": {"rule": Adam(betas=(0.7, 0.9), eps=1e-2), "lr": 0.05, "weight_decay": 0.3},
    "momentum with weight decay": {"rule": Momentum(0.8), "weight_decay": 0.3},
    "Nesterov's of no momentum": {"rule": Momentum(0.0, nesterov=True)},
}


@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize(("name", "setting"), LIBRARY_SETTINGS)
def test_setting_is_equal_or_raises(name: str, setting: str, second_order: bool) -> None:
    library = load_library(name)
    forward, theta, inner = model_with_setting(setting, second_order=second_order)
    episodes = vectors()
    if setting in SUPPORTED[name]:
        ours = meta_gradient(forward, theta, episodes, inner)
        assert_equal(library(mlp(), episodes, inner, params=theta), ours)
        other_order = dataclasses.replace(inner, second_order=not second_order)
        assert relative_error(library(mlp(), episodes, other_order, params=theta).grads, ours.grads) > 1e-3
    else:
        with pytest.raises(UnsupportedSettingError, match=r"does not offer \w+=.*; it offers plain gradient steps"):
            library(mlp(), episodes, inner, params=theta)


@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("setting", MORE)
@pytest.mark.parametrize("name", ["higher", "torchopt"])
def test_rule_equals_ours(name: str, setting: str, second_order: bool) -> None:
    library = load_library(name)
    module, episodes = smooth(), vectors()
    inner = InnerLoop(**{"lr": 0.2, "steps": 3, "second_order": second_order, **MORE[setting]})
    assert_equal(library(module, episodes, inner), meta_gradient(*functionalize(module), episodes, inner))


@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("name", ["by_hand", *LIBRARIES])
def test_plain_steps_at_given_theta_equal_ours(name: str, second_order: bool) -> None:
    library = load_library(name)
    module, episodes = mlp(), vectors()
    forward, theta = functionalize(module)
    theta = {n: p + 0.1 for n, p in reversed(theta.items())}  # neither the module's values nor its order
    inner = InnerLoop(0.2, 3, second_order=second_order)
    before = {n: p.clone() for n, p in (*theta.items(), *module.named_parameters())}
    assert_equal(library(module, episodes, inner, params=theta), meta_gradient(forward, theta, episodes, inner))
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in module.named_parameters())
    assert not any(p.requires_grad for p in theta.values())


class Late(nn.Linear):
    """Adds a shift to sets of 9 examples, the query sets, alone."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.shift = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.shift * (len(x) == 9)


@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("name", ["higher", "torchopt"])
def test_decay_reaches_parameters_outside_the_support_loss(name: str, second_order: bool) -> None:
    library = load_library(name)
    module, episodes = Late().double(), vectors()
    inner = InnerLoop(0.2, 3, second_order=second_order, rule=Momentum(0.5), weight_decay=0.5)
    assert_equal(library(module, episodes, inner), meta_gradient(*functionalize(module), episodes, inner))


def test_adam_at_zero_gradients() -> None:
    """Ours and higher's derivative of sqrt at 0 is 0; TorchOpt's is NaN, as its docstring says."""
    module, episodes = nn.Linear(4, 3).double(), vectors()
    episodes.support_x[..., 0] = 0.0
    inner = InnerLoop(0.05, 3, rule=Adam(betas=(0.7, 0.9), eps=1e-2))
    ours = meta_gradient(*functionalize(module), episodes, inner)
    assert_equal(load_library("higher")(module, episodes, inner), ours)
    assert load_library("torchopt")(module, episodes, inner).grads["weight"].isnan().any()


class Plain(SGD):
    pass


class Heavier(Momentum):
    pass


@pytest.mark.parametrize("rule", [Plain(), Heavier()])
@pytest.mark.parametrize("name", SUPPORTED)
def test_subclass_of_a_rule_raises(name: str, rule: SGD | Momentum) -> None:
    library = load_library(name)
    with pytest.raises(UnsupportedSettingError, match=rf"does not offer rule={type(rule).__name__}\("):
        library(mlp(), vectors(), InnerLoop(0.2, 3, rule=rule))


def test_error_lists_supported_settings() -> None:
    supported = {"rule": (SGD, Momentum), "learned_lr": ("parameter",), "adapted_params": None}
    check_supported(
        "theirs", InnerLoop(0.2, 3, rule=Momentum(), learned_lr="parameter", adapted_params=HEAD), supported
    )
    with pytest.raises(UnsupportedSettingError) as raised:
        check_supported("theirs", InnerLoop(0.2, 3, learned_lr="layer"), supported)
    assert str(raised.value) == (
        "theirs does not offer learned_lr='layer'; it offers plain gradient steps and rule=SGD or Momentum and "
        "learned_lr='parameter' and adapted_params. Leave it out, or take metalearn's own engines "
        "(algorithm.backend=metalearn), which offer all."
    )


def test_every_unsupported_setting_raises() -> None:
    """A future setting of InnerLoop raises until a library supports it."""
    supported = {"rule": (SGD,)}
    ignored = {"second_order": False, "engine": "adjoint", "task_chunk": 2, "checkpoint_every": 2}
    check_supported("theirs", InnerLoop(0.3, 5, **ignored), supported)  # type: ignore[arg-type]
    unsupported = {
        "rule": Adam(),
        "learned_lr": "layer",
        "transform": MetaCurvature(),
        "weight_decay": 0.1,
        "decoupled_weight_decay": 0.1,
        "lr_scale": lambda k, name: 0.5,
        "clip_norm": 1.0,
        "proximal_weight": 0.1,
        "adapted_params": HEAD,
        "query_weights": (1.0, 1.0),
        "per_step_params": BODY,
        "initializer": lambda forward, fast, x, y: fast,
    }
    assert unsupported.keys() | ignored.keys() | {"lr", "steps"} == {f.name for f in dataclasses.fields(InnerLoop)}
    for setting, value in unsupported.items():
        with pytest.raises(UnsupportedSettingError, match=f"theirs does not offer {setting}="):
            check_supported("theirs", InnerLoop(0.2, 1, **{setting: value}), supported)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SUPPORTED)
def test_theta_that_does_not_match_the_module_raises(name: str) -> None:
    library = load_library(name)
    module, episodes, inner = mlp(), vectors(), InnerLoop(0.2, 2)
    _, theta = functionalize(module)
    head = theta["layers.4.weight"]
    rates = with_learned_lrs(theta, InnerLoop(0.2, 2, learned_lr="layer"))
    for params, message in (
        (
            {n: p for n, p in theta.items() if p is not head},
            r"params lacks layers\.4\.weight; the module's trainable parameters are lay",
        ),
        ({**theta, "heads": head}, r"params has heads; the module's"),
        (
            {**theta, "layers.4.weight": head.float()},
            r"weight'\] is float32 \[3, 6\] on cpu, and the module's is float64 \[3, 6\]",
        ),
        (
            {**theta, "layers.4.weight": head[:1]},
            r"is float64 \[1, 6\] on cpu, and the module's is float64 \[3, 6\] on cpu",
        ),
        (rates, r"params has lr::layers"),
    ):
        with pytest.raises(ValueError, match=message):
            library(module, episodes, inner, params=params)
