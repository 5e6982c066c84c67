"""Update rules of a user's own: every engine differentiates them, and mistakes raise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from metalearn import InnerLoop, Params, meta_gradient
from metalearn.core.params import relative_error
from metalearn.inner import SGD, UpdateRule, state_key
from metalearn.metagrad import ENGINES
from tests.metagrad.settings import small_mlp, vectors


class Mistaken(SGD):
    """Returns a function of the gradients."""

    def __init__(self, make_output: Any) -> None:
        object.__setattr__(self, "make_output", make_output)

    def update(self, k: int, grads: Params, state: Params) -> tuple[Params, Params]:
        result: tuple[Params, Params] = self.make_output(grads)  # type: ignore[attr-defined]
        return result


@pytest.mark.parametrize(
    ("make_output", "message"),
    [
        (lambda g: g, r"the rule Mistaken must return \(directions, state\)"),
        (lambda g: None, r"must return \(directions, state\)"),
        (lambda g: (dict(list(g.items())[1:]), {}), "its direction for 'layers.1.weight' is missing"),
        (lambda g: ({n: v.mean(0) for n, v in g.items()}, {}), r"is \(6,\), and the gradient is \(3, 6\)"),
        (lambda g: (g, {"q": g["layers.1.bias"]}), "its state has the name 'q', which is a parameter's"),
    ],
)
def test_rule_with_wrong_output_raises(make_output: Any, message: str) -> None:
    forward, theta = small_mlp()
    with pytest.raises((ValueError, TypeError), match=message):
        meta_gradient(forward, theta, vectors(), InnerLoop(0.2, 2, rule=Mistaken(make_output)))


class Reversed(SGD):
    """A subclass of SGD, which is not plain."""

    def update(self, k: int, grads: Params, state: Params) -> tuple[Params, Params]:
        return {name: -g for name, g in grads.items()}, state


@dataclass(frozen=True)
class Smoothed:
    """Smoothed signs of gradients, with state."""

    def init(self, fast: Params) -> Params:
        return {f"last::{name}": torch.zeros_like(w) for name, w in fast.items()}

    def update(self, k: int, grads: Params, state: Params) -> tuple[Params, Params]:
        directions = {n: torch.tanh(g + state[f"last::{n}"]) for n, g in grads.items()}
        return directions, {f"last::{n}": g for n, g in grads.items()}


@dataclass(frozen=True)
class DecayToInitial:
    """Decay by a fading copy of the first weights: the state is a function of theta."""

    def init(self, fast: Params) -> Params:
        return {state_key("initial", name): w for name, w in fast.items()}

    def update(self, k: int, grads: Params, state: Params) -> tuple[Params, Params]:
        directions = {name: g + 0.5 * state[state_key("initial", name)] for name, g in grads.items()}
        return directions, {name: 0.9 * w for name, w in state.items()}


class Preconditioned(DecayToInitial):
    """A preconditioner that depends on theta and on gradients: linear in neither alone."""

    def update(self, k: int, grads: Params, state: Params) -> tuple[Params, Params]:
        directions = {name: g * state[state_key("initial", name)] for name, g in grads.items()}
        return directions, {state_key("initial", n): state[state_key("initial", n)] + 0.1 * g for n, g in grads.items()}


class ConstantState(DecayToInitial):
    """The state is a constant that depends on nothing."""

    def update(self, k: int, grads: Params, state: Params) -> tuple[Params, Params]:
        return grads, {name: torch.full_like(w, k).detach() for name, w in state.items()}


@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("rule", [Reversed(), Smoothed(), DecayToInitial(), Preconditioned(), ConstantState()])
def test_engines_are_equal_for_a_custom_rule(rule: UpdateRule, second_order: bool) -> None:
    forward, theta = small_mlp()
    episodes = vectors()
    inners = [InnerLoop(0.2, 3, second_order, engine, rule=rule) for engine in ENGINES]
    first, *others = (meta_gradient(forward, theta, episodes, inner).grads for inner in inners)
    assert all(relative_error(grads, first) < 1e-12 for grads in others)
    assert not inners[0].is_plain_sgd


class StoresVelocity:
    """Momentum as an attribute, where no engine sees it."""

    def init(self, fast: Params) -> Params:
        self.velocity = {name: torch.zeros_like(w) for name, w in fast.items()}
        return {}

    def update(self, k: int, grads: Params, state: Params) -> tuple[Params, Params]:
        return grads, state


class Counts(StoresVelocity):
    def __init__(self) -> None:
        self.calls = 0

    def init(self, fast: Params) -> Params:
        return {}

    def update(self, k: int, grads: Params, state: Params) -> tuple[Params, Params]:
        self.calls += 1
        return {name: g / self.calls for name, g in grads.items()}, state


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("rule", "name"), [(StoresVelocity, "velocity"), (Counts, "calls")])
def test_rule_that_changes_itself_raises(rule: Any, name: str, engine: str) -> None:
    forward, theta = small_mlp()
    with pytest.raises(ValueError, match=rf"{rule.__name__} keeps '{name}' on itself.*state_key\(kind, name\)"):
        meta_gradient(forward, theta, vectors(), InnerLoop(0.2, 3, rule=rule(), engine=engine))
