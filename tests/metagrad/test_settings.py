"""Every setting of the inner loop, through every engine and in both orders: against each other, and differences."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

from metalearn import Episodes, InnerLoop, Params, adapt, functionalize, meta_gradient
from metalearn.core.functional import relative_error
from metalearn.inner import (
    SGD,
    init_state,
    inner_step,
    lr_key,
    params_at_step,
    state_key,
    task_losses,
    with_learned_lrs,
)
from metalearn.metagrad import ENGINES
from metalearn.models import MLP
from tests.metagrad.settings import BODY, HEAD, NORM, SETTINGS, family, vectors


@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("setting", SETTINGS)
def test_engines_are_equal(setting: str, second_order: bool) -> None:
    forward, theta, inner = family(setting, second_order=second_order)
    episodes = vectors()
    expected = meta_gradient(forward, theta, episodes, inner)
    for engine, every, chunk in (
        ("checkpoint", 1, None),
        ("adjoint", 1, 2),
        ("checkpoint", 2, 2),
        ("adjoint", 2, None),
    ):
        other = dataclasses.replace(inner, engine=engine, snapshot_every=every, task_chunk=chunk)
        got = meta_gradient(forward, theta, episodes, other)
        assert relative_error(got.grads, expected.grads) < 1e-9
        torch.testing.assert_close(got.loss, expected.loss)
        torch.testing.assert_close(got.support_loss, expected.support_loss)
        torch.testing.assert_close(got.predictions, expected.predictions)


@pytest.mark.parametrize("setting", SETTINGS)
def test_second_order_equals_finite_differences(setting: str) -> None:
    forward, theta, inner = family(setting, engine="adjoint")
    episodes, eps = vectors(), 1e-6
    grads = meta_gradient(forward, theta, episodes, inner).grads

    first = dataclasses.replace(inner, second_order=False, engine="unroll")  # the loss is the same, and cheaper

    def loss_at(name: str, moved: torch.Tensor) -> float:
        return meta_gradient(forward, {**theta, name: moved}, episodes, first).loss.item()

    for name, grad in grads.items():  # each block by itself, learned rates among them
        noise = torch.randn_like(grad)
        direction = grad / grad.norm().clamp_min(1e-12) + noise / noise.norm()
        slope = (loss_at(name, theta[name] + eps * direction) - loss_at(name, theta[name] - eps * direction)) / (
            2 * eps
        )
        assert slope == pytest.approx((grad * direction).sum().item(), rel=1e-5, abs=1e-8), name


@pytest.mark.parametrize("setting", SETTINGS)
def test_first_order_takes_inner_gradients_for_constants(setting: str) -> None:
    """Against a loop in which they are constants by ``detach``: another way to the same definition."""
    forward, theta, inner = family(setting, second_order=False)
    episodes = vectors()
    at = {name: p.clone().requires_grad_() for name, p in theta.items()}
    carry = init_state(forward, at, episodes.support_x, episodes.support_y, inner)
    objective = torch.zeros((), dtype=torch.float64)
    for k, weight in enumerate(inner.weights):
        if k:
            constant = {name: w.detach() for name, w in carry.items()}
            own = {n: constant[n].requires_grad_() for n in (inner.adapted or theta) if "::" not in n}
            losses = task_losses(
                forward, params_at_step({**constant, **own}, inner, k - 1), episodes.support_x, episodes.support_y,
                loss=cross_entropy,
            ).losses  # fmt: skip
            gs = torch.autograd.grad(losses.sum(), list(own.values()))
            from metalearn.inner import apply_update

            carry = apply_update(carry, dict(zip(own, gs, strict=True)), inner, k - 1)
        fast = params_at_step(carry, inner, k)
        objective = (
            objective
            + weight * task_losses(forward, fast, episodes.query_x, episodes.query_y, loss=cross_entropy).losses.mean()
        )
    grads = torch.autograd.grad(objective, list(at.values()), materialize_grads=True)
    got = meta_gradient(forward, theta, episodes, inner)
    assert relative_error(got.grads, dict(zip(at, grads, strict=True))) < 1e-12


def test_weighted_steps_are_the_sum_of_their_losses() -> None:
    forward, theta = functionalize(MLP(4, 3, hidden=(6,)).double())
    episodes, weights = vectors(), (0.1, 0.2, 0.0, 0.7)
    got = meta_gradient(forward, theta, episodes, InnerLoop(0.2, 3, query_weights=weights))
    each = [meta_gradient(forward, theta, episodes, InnerLoop(0.2, steps)) for steps in range(4)]
    terms = [{name: w * g for name, g in part.grads.items()} for w, part in zip(weights, each, strict=True)]
    expected = {name: torch.stack([term[name] for term in terms]).sum(dim=0) for name in theta}
    assert relative_error(got.grads, expected) < 1e-12
    assert got.loss.item() == pytest.approx(sum(w * p.loss.item() for w, p in zip(weights, each, strict=True)))


@pytest.mark.parametrize("second_order", [True, False])
def test_adapting_the_head_is_a_rate_of_zero_elsewhere(second_order: bool) -> None:
    forward, theta = functionalize(MLP(4, 3, hidden=(6,)).double())
    episodes = vectors()
    anil = InnerLoop(0.2, 3, second_order=second_order, adapted=HEAD)
    masked = dataclasses.replace(anil, adapted=None, learned_lr="parameter")
    rates = with_learned_lrs(theta, masked)
    rates |= {lr_key(name): torch.zeros_like(theta[name]) for name in BODY}
    got, expected = meta_gradient(forward, theta, episodes, anil), meta_gradient(forward, rates, episodes, masked)
    assert relative_error(got.grads, {name: expected.grads[name] for name in theta}) < 1e-12


def test_every_step_has_its_own_rate() -> None:
    """Against one step after the other, each by a plain inner loop of its rate."""
    forward, theta = functionalize(MLP(4, 3, hidden=(6,)).double())
    episodes, rates = vectors(tasks=1), (0.1, 0.3, 0.2)
    inner = InnerLoop(0.1, 3, learned_lr="layer_and_step")
    learned = {
        n: torch.tensor(rates, dtype=p.dtype) if "::" in n else p for n, p in with_learned_lrs(theta, inner).items()
    }
    got = adapt(forward, learned, episodes.support_x, episodes.support_y, inner)
    for rate in rates:
        fast = adapt(forward, theta, episodes.support_x, episodes.support_y, InnerLoop(rate, 1))
        theta = {name: w[0] for name, w in fast.items()}
    for name, w in theta.items():
        torch.testing.assert_close(got[name][0], w)


def test_every_step_has_its_own_batch_norm() -> None:
    """By its definition, one task at a time: the model after k steps is given the k-th row."""
    forward, theta, inner = family("per-step BatchNorm, not adapted")
    episodes = vectors(tasks=1)

    def at(fast: Params, k: int) -> Params:
        return {**fast, **{name: theta[name][k] for name in NORM}}

    fast = {name: p.clone().requires_grad_() for name, p in theta.items() if name not in NORM}
    for k in range(3):
        own = {name: w for name, w in fast.items() if name in BODY}
        loss = cross_entropy(forward(at(fast, k), episodes.support_x[0]), episodes.support_y[0])
        grads = torch.autograd.grad(loss, list(own.values()))
        fast = {**fast, **{n: w - 0.2 * g for (n, w), g in zip(own.items(), grads, strict=True)}}
    expected = forward(at(fast, 3), episodes.query_x[0])
    got = meta_gradient(forward, theta, episodes, inner)
    torch.testing.assert_close(got.predictions[0], expected)
    assert all(row.norm() > 0 for name in NORM for row in got.grads[name]), "every step's row is learned"


def test_meta_gradient_in_rates_is_the_closed_form() -> None:
    """One step on a linear model: d L_query / d alpha = -<dL_query(theta_1), dL_support(theta_0)>, entry by entry."""
    forward, theta = functionalize(torch.nn.Linear(4, 1).double())
    x, y = torch.randn(2, 5, 4, dtype=torch.float64), torch.randn(2, 5, 1, dtype=torch.float64)
    episodes = Episodes(x, y, x.flip(1) + 1, y)
    inner = InnerLoop(0.1, 1, learned_lr="parameter", second_order=False)
    got = meta_gradient(forward, with_learned_lrs(theta, inner), episodes, inner, loss=mse_loss).grads
    total = torch.zeros(1, 4, dtype=torch.float64)
    for t in range(2):
        w, b = theta["weight"], theta["bias"]
        r = x[t] @ w.T + b - y[t]
        g_w, g_b = 2 * (r * x[t]).mean(0, keepdim=True), 2 * r.mean(0)
        w, b = w - 0.1 * g_w, b - 0.1 * g_b
        q = episodes.query_x[t]
        total -= 2 * ((q @ w.T + b - y[t]) * q).mean(0, keepdim=True) * g_w / 2
    torch.testing.assert_close(got[lr_key("weight")], total)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_rule_of_ones_own(engine: str) -> None:
    """Signs of gradients, remembered: of no library."""

    @dataclasses.dataclass(frozen=True)
    class Smoothed:
        def start(self, fast: Params) -> Params:
            return {f"last::{name}": torch.zeros_like(w) for name, w in fast.items()}

        def __call__(self, k: int, grads: Params, state: Params) -> tuple[Params, Params]:
            directions = {n: torch.tanh(g + state[f"last::{n}"]) for n, g in grads.items()}
            return directions, {f"last::{n}": g for n, g in grads.items()}

    forward, theta = functionalize(MLP(4, 3, hidden=(6,)).double())
    inner, episodes = InnerLoop(0.2, 3, rule=Smoothed()), vectors()
    expected = meta_gradient(forward, theta, episodes, inner)
    got = meta_gradient(forward, theta, episodes, dataclasses.replace(inner, engine=engine))
    assert relative_error(got.grads, expected.grads) < 1e-9


class Mistaken(SGD):
    """Returns what ``returned`` makes of the gradients."""

    def __init__(self, returned: Any) -> None:
        object.__setattr__(self, "returned", returned)

    def __call__(self, k: int, grads: Params, state: Params) -> tuple[Params, Params]:
        result: tuple[Params, Params] = self.returned(grads)  # type: ignore[attr-defined]
        return result


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda g: g, r"the rule Mistaken must return \(directions, state\)"),
        (lambda g: None, r"must return \(directions, state\)"),
        (lambda g: (dict(list(g.items())[1:]), {}), "its direction for 'layers.1.weight' is missing"),
        (lambda g: ({n: v.mean(0) for n, v in g.items()}, {}), r"is \(6,\), and the gradient is \(3, 6\)"),
        (lambda g: (g, {"q": g["layers.1.bias"]}), "its state has the name 'q', which is a parameter's"),
    ],
)
def test_a_rule_with_a_mistake_is_refused(returned: Any, message: str) -> None:
    forward, theta = functionalize(MLP(4, 3, hidden=(6,)).double())
    with pytest.raises((ValueError, TypeError), match=message):
        meta_gradient(forward, theta, vectors(), InnerLoop(0.2, 2, rule=Mistaken(returned)))


def test_what_does_not_fit_is_refused() -> None:
    forward, theta = functionalize(MLP(4, 3, hidden=(6,)).double())
    learned = InnerLoop(0.2, 3, learned_lr="layer")
    with pytest.raises(ValueError, match=r"params lacks lr::layers.1.bias, .*with_learned"):
        meta_gradient(forward, theta, vectors(), learned)
    with pytest.raises(ValueError, match=r"params has lr::layers\.1\.bias"):
        meta_gradient(forward, with_learned_lrs(theta, learned), vectors(), InnerLoop(0.2, 3))
    with pytest.raises(ValueError, match=r"adapted names heads, which params has not; it has layers.1.weight"):
        meta_gradient(forward, theta, vectors(), InnerLoop(0.2, 3, adapted=frozenset({"heads"})))


def test_rates_and_rows_of_another_shape_are_refused() -> None:
    forward, theta = functionalize(MLP(4, 3, hidden=(6,)).double())
    for made, taken in (("layer", "layer_and_step"), ("parameter", "layer"), ("layer", "parameter")):
        params = with_learned_lrs(theta, InnerLoop(0.2, 3, learned_lr=made))
        with pytest.raises(ValueError, match=rf"has shape .* not that of learned_lr='{taken}'"):
            meta_gradient(forward, params, vectors(), InnerLoop(0.2, 3, learned_lr=taken))
    params = with_learned_lrs(theta, InnerLoop(0.2, 2, learned_lr="layer_and_step"))
    more = InnerLoop(0.2, 5, learned_lr="layer_and_step")
    with pytest.raises(ValueError, match=r"has shape \(2,\)"):
        meta_gradient(forward, params, vectors(), more)
    assert adapt(forward, params, vectors().support_x, vectors().support_y, more), "in tests the last one stands"
    with pytest.raises(ValueError, match=r"it must lead with 3, one for every number of steps"):
        meta_gradient(forward, theta, vectors(), InnerLoop(0.2, 2, per_step=NORM))


def test_a_step_of_sgd_stays_a_step_of_sgd() -> None:
    forward, theta = functionalize(MLP(4, 3, hidden=(6,)).double())
    episodes, inner = vectors(), InnerLoop(0.2, 1)
    carry = init_state(forward, theta, episodes.support_x, episodes.support_y, inner)
    assert carry.keys() == theta.keys()
    after, _ = inner_step(forward, carry, episodes.support_x, episodes.support_y, inner, loss=cross_entropy, k=0)
    assert after.keys() == theta.keys()


@dataclass(frozen=True)
class TowardsStart:
    """Decay towards a fading copy of the first weights: what is remembered is a function of theta."""

    def start(self, fast: Params) -> Params:
        return {state_key("start", name): w for name, w in fast.items()}

    def __call__(self, k: int, grads: Params, state: Params) -> tuple[Params, Params]:
        directions = {name: g + 0.5 * state[state_key("start", name)] for name, g in grads.items()}
        return directions, {name: 0.9 * w for name, w in state.items()}


class TimesStart(TowardsStart):
    """A preconditioner that theta decides, and gradients move: linear in neither alone."""

    def __call__(self, k: int, grads: Params, state: Params) -> tuple[Params, Params]:
        directions = {name: g * state[state_key("start", name)] for name, g in grads.items()}
        return directions, {state_key("start", n): state[state_key("start", n)] + 0.1 * g for n, g in grads.items()}


class NewConstant(TowardsStart):
    """Forgets what it had: its state does not depend on anything."""

    def __call__(self, k: int, grads: Params, state: Params) -> tuple[Params, Params]:
        return grads, {name: torch.full_like(w, k).detach() for name, w in state.items()}


@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("rule", [TowardsStart(), TimesStart(), NewConstant()])
def test_a_rule_that_begins_with_the_weights_keeps_that_path(rule: TowardsStart, second_order: bool) -> None:
    forward, theta = functionalize(MLP(4, 3, hidden=(6,)).double())
    episodes = vectors()
    results = [
        meta_gradient(forward, theta, episodes, InnerLoop(0.2, 3, second_order, engine, rule=rule)).grads
        for engine in ENGINES
    ]
    for grads in results[1:]:
        assert relative_error(grads, results[0]) < 1e-12


@pytest.mark.parametrize("engine", ENGINES)
def test_weight_decay_reaches_what_the_support_loss_does_not(engine: str) -> None:
    """The query loss is w, which decays K times: d L_query / d w_0 = (1 - lr * decay)^K."""

    def forward(params: Params, x: Tensor) -> Tensor:
        return x * params["v"] + torch.where(x > 0, params["w"], 0.0)

    x = torch.ones(2, 3, 1, dtype=torch.float64)
    theta = {name: torch.ones((), dtype=torch.float64) for name in ("v", "w")}
    inner = InnerLoop(lr=0.1, steps=3, weight_decay=0.5, engine=engine)
    got = meta_gradient(forward, theta, Episodes(-x, x, x, x), inner, loss=lambda p, y: p.mean()).grads["w"]
    assert got.item() == pytest.approx((1 - 0.1 * 0.5) ** 3, rel=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("second_order", [True, False])
def test_adapting_only_what_the_loss_does_not_reach_is_an_error(second_order: bool, engine: str) -> None:
    def forward(params: Params, x: Tensor) -> Tensor:
        return x * params["used"]

    x = torch.ones(2, 3, 1)
    theta = {name: torch.ones((), requires_grad=True) for name in ("used", "idle")}
    inner = InnerLoop(lr=0.1, steps=1, adapted=frozenset({"idle"}), engine=engine, second_order=second_order)
    for call in (
        lambda: meta_gradient(forward, theta, Episodes(x, x, x, x), inner, loss=mse_loss),
        lambda: adapt(forward, theta, x, x, inner, loss=mse_loss),
    ):
        with pytest.raises(ValueError, match=r"depends on no parameter of idle:.*adapted leaves out"):
            call()


class KeepsOnItself:
    """Momentum, remembered where no engine sees it."""

    def start(self, fast: Params) -> Params:
        self.velocity = {name: torch.zeros_like(w) for name, w in fast.items()}
        return {}

    def __call__(self, k: int, grads: Params, state: Params) -> tuple[Params, Params]:
        return grads, state


class Counts(KeepsOnItself):
    def __init__(self) -> None:
        self.calls = 0

    def start(self, fast: Params) -> Params:
        return {}

    def __call__(self, k: int, grads: Params, state: Params) -> tuple[Params, Params]:
        self.calls += 1
        return {name: g / self.calls for name, g in grads.items()}, state


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("rule", "name"), [(KeepsOnItself, "velocity"), (Counts, "calls")])
def test_a_rule_that_keeps_its_state_on_itself_is_refused(rule: Any, name: str, engine: str) -> None:
    forward, theta = functionalize(MLP(4, 3, hidden=(6,)).double())
    with pytest.raises(ValueError, match=rf"{rule.__name__} keeps '{name}' on itself.*state_name\(kind, name\)"):
        meta_gradient(forward, theta, vectors(), InnerLoop(0.2, 3, rule=rule(), engine=engine))
