"""Every setting of the inner loop by every engine and in both orders: against one another and finite differences."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

from metalearn import Episodes, InnerLoop, Params, adapt, meta_gradient
from metalearn.core.params import relative_error
from metalearn.inner import (
    apply_update,
    init_state,
    inner_step,
    params_at_step,
    task_losses,
    with_learned_lrs,
)
from metalearn.metagrad import ENGINES
from tests.metagrad.settings import BODY, NORM, SETTINGS, assert_equal, model_with_setting, small_mlp, vectors


@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("setting", SETTINGS)
def test_engines_are_equal(setting: str, second_order: bool) -> None:
    forward, theta, inner = model_with_setting(setting, second_order=second_order)
    episodes = vectors()
    expected = meta_gradient(forward, theta, episodes, inner)
    for engine, every, chunk in (
        ("unroll", 1, 1),
        ("unroll", 1, 2),
        ("checkpoint", 1, 5),
        ("checkpoint", 2, 2),
        ("adjoint", 1, 2),
        ("adjoint", 2, None),
    ):
        other = dataclasses.replace(inner, engine=engine, checkpoint_every=every, task_chunk=chunk)
        assert_equal(meta_gradient(forward, theta, episodes, other), expected)


@pytest.mark.parametrize("setting", SETTINGS)
def test_second_order_equals_finite_differences(setting: str) -> None:
    forward, theta, inner = model_with_setting(setting, engine="adjoint")
    episodes, eps = vectors(), 1e-6
    grads = meta_gradient(forward, theta, episodes, inner).grads

    first = dataclasses.replace(inner, second_order=False, engine="unroll")  # the loss is the same, and cheaper

    def loss_at(name: str, moved: torch.Tensor) -> float:
        return meta_gradient(forward, {**theta, name: moved}, episodes, first).loss.item()

    for name, grad in grads.items():  # each block by itself, learned rates among them
        noise = torch.randn_like(grad)
        step = eps * (grad / grad.norm().clamp_min(1e-12) + noise / noise.norm())
        slope = (loss_at(name, theta[name] + step) - loss_at(name, theta[name] - step)) / (2 * eps)
        assert slope == pytest.approx((grad * step).sum().item() / eps, rel=1e-5, abs=1e-8), name


@pytest.mark.parametrize("setting", SETTINGS)
def test_first_order_equals_loop_with_detached_gradients(setting: str) -> None:
    forward, theta, inner = model_with_setting(setting, second_order=False)
    episodes = vectors()
    at = {name: p.clone().requires_grad_() for name, p in theta.items()}
    state = init_state(forward, at, episodes.support_x, episodes.support_y, inner)
    objective = torch.zeros((), dtype=torch.float64)
    for k, weight in enumerate(inner.query_loss_weights):
        if k:
            constant = {name: w.detach() for name, w in state.items()}
            own = {n: constant[n].requires_grad_() for n in (inner.adapted_params or theta) if "::" not in n}
            fast = params_at_step({**constant, **own}, inner, k - 1)
            losses, _ = task_losses(forward, fast, episodes.support_x, episodes.support_y, loss=cross_entropy)
            gs = torch.autograd.grad(losses.sum(), list(own.values()))
            state = apply_update(state, dict(zip(own, gs, strict=True)), inner, k - 1)
        fast = params_at_step(state, inner, k)
        losses, _ = task_losses(forward, fast, episodes.query_x, episodes.query_y, loss=cross_entropy)
        objective = objective + weight * losses.mean()
    grads = torch.autograd.grad(objective, list(at.values()), materialize_grads=True)
    got = meta_gradient(forward, theta, episodes, inner)
    assert relative_error(got.grads, dict(zip(at, grads, strict=True))) < 1e-12


def test_weighted_steps_equal_weighted_sum_of_gradients() -> None:
    forward, theta = small_mlp()
    episodes, weights = vectors(), (0.1, 0.2, 0.0, 0.7)
    got = meta_gradient(forward, theta, episodes, InnerLoop(0.2, 3, query_weights=weights))
    each = [meta_gradient(forward, theta, episodes, InnerLoop(0.2, steps)) for steps in range(4)]
    terms = [{name: w * g for name, g in part.grads.items()} for w, part in zip(weights, each, strict=True)]
    expected = {name: torch.stack([term[name] for term in terms]).sum(dim=0) for name in theta}
    assert relative_error(got.grads, expected) < 1e-12
    assert got.loss.item() == pytest.approx(sum(w * p.loss.item() for w, p in zip(weights, each, strict=True)))


def test_layer_and_step_rates_equal_single_steps() -> None:
    forward, theta = small_mlp()
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


def test_per_step_batch_norm_equals_plain_loop() -> None:
    forward, theta, inner = model_with_setting("per-step BatchNorm, not adapted")
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
    assert all(row.norm() > 0 for name in NORM for row in got.grads[name]), "every row is learned"


def test_params_that_do_not_match_settings_raise() -> None:
    forward, theta = small_mlp()
    plain, by_layer, by_step = InnerLoop(0.2, 3), InnerLoop(0.2, 3, learned_lr="layer"), "layer_and_step"
    two_steps = with_learned_lrs(theta, InnerLoop(0.2, 2, learned_lr=by_step))
    for params, inner, message in (
        (theta, by_layer, r"params lacks lr::layers.1.bias, .*with_learned_lrs"),
        (with_learned_lrs(theta, by_layer), plain, r"params has lr::layers\.1\.bias"),
        (
            theta,
            InnerLoop(0.2, 3, adapted_params=frozenset({"heads"})),
            r"names heads; the names in params are layers.1.weight",
        ),
        (two_steps, InnerLoop(0.2, 5, learned_lr=by_step), r"has shape \(2,\)"),
        (theta, InnerLoop(0.2, 2, per_step_params=NORM), r"it must lead with 3, one for every number of steps"),
        *(
            (
                with_learned_lrs(theta, InnerLoop(0.2, 3, learned_lr=made)),
                InnerLoop(0.2, 3, learned_lr=taken),
                rf"has shape .* not that of learned_lr='{taken}'",
            )
            for made, taken in (("layer", by_step), ("parameter", "layer"), ("layer", "parameter"))
        ),
    ):
        with pytest.raises(ValueError, match=message):
            meta_gradient(forward, params, vectors(), inner)
    more, support = InnerLoop(0.2, 5, learned_lr=by_step), (vectors().support_x, vectors().support_y)
    assert adapt(forward, two_steps, *support, more), "in evaluation the last one is used"


def test_sgd_state_holds_only_parameters() -> None:
    forward, theta = small_mlp()
    episodes, inner = vectors(), InnerLoop(0.2, 1)
    state = init_state(forward, theta, episodes.support_x, episodes.support_y, inner)
    assert state.keys() == theta.keys()
    after, _ = inner_step(forward, state, episodes.support_x, episodes.support_y, inner, loss=cross_entropy, k=0)
    assert after.keys() == theta.keys()


@pytest.mark.parametrize("engine", ENGINES)
def test_weight_decay_reaches_parameters_outside_the_support_loss(engine: str) -> None:
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
def test_adapting_only_unused_parameters_raises(second_order: bool, engine: str) -> None:
    def forward(params: Params, x: Tensor) -> Tensor:
        return x * params["used"]

    x = torch.ones(2, 3, 1)
    theta = {name: torch.ones((), requires_grad=True) for name in ("used", "idle")}
    inner = InnerLoop(lr=0.1, steps=1, adapted_params=frozenset({"idle"}), engine=engine, second_order=second_order)
    message = r"depends on no parameter of idle:.*adapted_params leaves out"
    with pytest.raises(ValueError, match=message):
        meta_gradient(forward, theta, Episodes(x, x, x, x), inner, loss=mse_loss)
    with pytest.raises(ValueError, match=message):
        adapt(forward, theta, x, x, inner, loss=mse_loss)
