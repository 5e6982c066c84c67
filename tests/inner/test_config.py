"""The settings of the inner loop: checks of type and range, conversions, and former names."""

from __future__ import annotations

import dataclasses
import re
import warnings
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from metalearn import InnerLoop, Params, functionalize, meta_gradient
from metalearn.inner import SGD, Adam, Momentum, ZeroContext
from metalearn.inner.config import ENGINE_NAMES
from metalearn.metagrad import ENGINES
from tests.metagrad.settings import vectors

ZERO_BIAS = ZeroContext(frozenset({"bias"}))
FORMER_FIELDS = {
    "adapted": ("adapted_params", frozenset({"bias"})),
    "per_step": ("per_step_params", frozenset({"bias"})),
    "proximal": ("proximal_weight", 0.5),
    "snapshot_every": ("checkpoint_every", 2),
    "start": ("initializer", ZERO_BIAS),
}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, "lr=0.0; it must be a positive number"),
        ({"lr": "0.1"}, "lr='0.1'; it must be a positive number"),
        ({"lr": float("nan")}, "lr=nan; it must be a positive number"),
        ({"lr": 10**400}, "lr=1000"),
        ({"steps": True}, "steps=True; it must be a whole number, 0 or more"),
        ({"steps": 1.5}, "steps=1.5; it must be a whole number"),
        ({"steps": -1}, "steps=-1; it must be a whole number, 0 or more"),
        ({"second_order": "false"}, "second_order='false'; it must be True or False"),
        ({"engine": ["unroll"]}, "engine=['unroll']; it must be one of unroll, checkpoint, adjoint."),
        ({"engine": "adjont"}, "engine='adjont'; it must be one of unroll, checkpoint, adjoint. Did you mean 'adj"),
        ({"engine": "Unroll"}, "Did you mean 'unroll'?"),
        ({"task_chunk": 1.5}, "task_chunk=1.5; it must be at least 1, or None"),
        ({"task_chunk": 0}, "task_chunk=0; it must be at least 1, or None"),
        ({"task_chunk": "2"}, "task_chunk='2'; it must be at least 1"),
        ({"checkpoint_every": 0}, "checkpoint_every=0; it must be a whole number, 1 or more"),
        ({"rule": "adam"}, "rule='adam' has no init; it must be an update rule"),
        ({"rule": torch.tanh}, "has no init; it must be an update rule"),
        ({"rule": Momentum}, "rule=Momentum is a class; make one of it: Momentum()"),
        ({"learned_lr": "each"}, "learned_lr='each'; it must be one of parameter, layer"),
        ({"weight_decay": -1}, "weight_decay=-1; it must be a number, 0 or more"),
        ({"proximal_weight": float("nan")}, "proximal_weight=nan; it must be a number, 0 or more"),
        ({"clip_norm": 0}, "clip_norm=0; it must be a positive number, or None"),
        ({"adapted_params": "head.weight"}, "adapted_params='head.weight'; it must be a set of names"),
        ({"adapted_params": frozenset()}, "adapted_params is empty"),
        ({"query_weights": (1.0,)}, "query_weights=(1.0,); they must be 3 numbers"),
        ({"query_weights": (0, 0, 0)}, "query_weights=(0, 0, 0); they must be 3 numbers"),
    ],
)
def test_wrong_setting_raises_with_its_value(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        InnerLoop(**{"lr": 0.1, "steps": 2, **settings})


def test_names_of_engines_are_those_of_the_engines() -> None:
    assert tuple(ENGINES) == ENGINE_NAMES


@pytest.mark.parametrize("make", [lambda: Momentum(1.0), lambda: Adam((0.9, 1.5)), lambda: Adam(eps=0.0)])
def test_wrong_setting_of_a_rule_raises(make: Any) -> None:
    with pytest.raises(ValueError, match="it must be"):
        make()


def test_numpy_numbers_and_fractions_are_converted() -> None:
    settings: dict[str, Any] = {"steps": 2, "task_chunk": 2, "checkpoint_every": 2}
    converted = InnerLoop(lr=Fraction(1, 2), **{n: np.int64(v) for n, v in settings.items()})  # type: ignore[arg-type]
    assert converted == InnerLoop(lr=0.5, **settings)
    assert {type(getattr(converted, name)) for name in settings} == {int}
    assert type(converted.lr) is float


@pytest.mark.parametrize("old", FORMER_FIELDS)
def test_former_field_works_and_warns(old: str) -> None:
    new, value = FORMER_FIELDS[old]
    expected = InnerLoop(0.1, 2, **{new: value})  # type: ignore[arg-type]
    with pytest.warns(FutureWarning, match=rf"InnerLoop\({old}=\.\.\.\) is called {new}= now"):
        made = InnerLoop(0.1, 2, **{old: value})  # type: ignore[arg-type]
    with pytest.warns(FutureWarning, match=rf"InnerLoop\({old}=\.\.\.\) is called {new}= now"):
        replaced = dataclasses.replace(InnerLoop(0.1, 2), **{old: value})  # type: ignore[arg-type]
    assert made == replaced == expected
    with pytest.warns(FutureWarning, match=rf"InnerLoop\.{old} is called {new} now"):
        assert getattr(made, old) == value


@pytest.mark.parametrize("old", FORMER_FIELDS)
def test_former_and_present_name_of_a_field_raise_together(old: str) -> None:
    new, value = FORMER_FIELDS[old]
    with pytest.raises(TypeError, match=rf"InnerLoop\(\) got {new}= and its former name {old}="):
        InnerLoop(0.1, 2, **{new: value, old: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(("old", "new"), [("plain", "is_plain_sgd"), ("weights", "query_loss_weights")])
def test_former_property_works_and_warns(old: str, new: str) -> None:
    inner = InnerLoop(0.1, 2)
    with pytest.warns(FutureWarning, match=rf"InnerLoop\.{old} is called {new} now") as warned:
        assert getattr(inner, old) == getattr(inner, new)
    assert warned[0].filename == __file__


def former_rules() -> list[Any]:
    """Return rules with the former methods: without a base class, derived from that, derived from ``Momentum``."""

    class Former:
        def start(self, fast: Params) -> Params:
            return Momentum().init(fast)

        def __call__(self, k: int, grads: Params, state: Params) -> tuple[Params, Params]:
            return Momentum().update(k, grads, state)

    class Doubled(Former):
        def __call__(self, k: int, grads: Params, state: Params) -> tuple[Params, Params]:
            directions, state = super().__call__(k, grads, state)
            return {name: 2 * d for name, d in directions.items()}, state

    with pytest.warns(FutureWarning, match="the method __call__ of Halved is called update now"):

        class Halved(Momentum):
            def __call__(self, k: int, grads: Params, state: Params) -> tuple[Params, Params]:
                directions, state = super().__call__(k, grads, state)  # type: ignore[misc]
                return {name: d / 2 for name, d in directions.items()}, state

    return [Former(), Doubled(), Halved()]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("engine", ENGINES)
def test_rule_with_former_methods_equals_momentum(engine: str) -> None:
    forward, theta = functionalize(nn.Linear(4, 3).double())
    episodes = vectors()
    for rule, scale in zip(former_rules(), (1, 2, 0.5), strict=True):
        inner = InnerLoop(0.2, 3, engine=engine, rule=rule)
        got = meta_gradient(forward, theta, episodes, inner).grads
        momentum = dataclasses.replace(inner, lr=0.2 * scale, rule=Momentum())
        torch.testing.assert_close(got, meta_gradient(forward, theta, episodes, momentum).grads)


def test_former_methods_warn_once_for_each_class() -> None:
    former, doubled, _ = former_rules()
    for rule in (former, doubled):
        with pytest.warns(FutureWarning, match=rf"the method \w+ of {type(rule).__name__} is called") as warned:
            InnerLoop(0.1, 1, rule=rule)
        assert len(warned) == len({str(w.message) for w in warned})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            InnerLoop(0.1, 1, rule=rule)


def test_former_methods_of_our_rules_work_and_warn() -> None:
    grads = {"w": torch.ones(1, 2)}
    with pytest.warns(FutureWarning, match=r"SGD\.__call__ is called update now"):
        assert SGD()(0, grads, {}) == (grads, {})  # type: ignore[operator]
    with pytest.warns(FutureWarning, match=r"Momentum\.start is called init now"):
        assert Momentum().start(grads).keys() == {"momentum::w"}  # type: ignore[attr-defined]


def test_former_state_name_works_and_warns() -> None:
    with pytest.warns(FutureWarning, match="state_name is called state_key now"):
        from metalearn.inner import state_name
    assert state_name("sum", "w") == "sum::w"
