"""Adaptation: its result, its graph, update rules against torch's optimizers, initializers against their definition."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, l1_loss, mse_loss
from torch.nn.utils import clip_grad_norm_

from metalearn import Episodes, InnerLoop, adapt, functionalize, meta_gradient, predict
from metalearn.inner import Adagrad, Adam, Momentum, RMSprop
from metalearn.models import MLP
from tests.metagrad.settings import vectors

RULES: dict[str, tuple[dict[str, Any], Callable[[Iterable[Tensor]], torch.optim.Optimizer]]] = {
    "sgd": ({}, lambda p: torch.optim.SGD(p, 0.1)),
    "sgd, weight decay": ({"weight_decay": 0.3}, lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.3)),
    "momentum": ({"rule": Momentum(0.8)}, lambda p: torch.optim.SGD(p, 0.1, momentum=0.8)),
    "nesterov": (
        {"rule": Momentum(0.8, nesterov=True), "weight_decay": 0.1},
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.8, nesterov=True, weight_decay=0.1),
    ),
    "adam": ({"rule": Adam()}, lambda p: torch.optim.Adam(p, 0.1)),
    "adam, weight decay": (
        {"rule": Adam((0.5, 0.8), 1e-3), "weight_decay": 0.1},
        lambda p: torch.optim.Adam(p, 0.1, betas=(0.5, 0.8), eps=1e-3, weight_decay=0.1),
    ),
    "dampening": (
        {"rule": Momentum(0.8, dampening=0.3)},
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.8, dampening=0.3),
    ),
    "adamw": (
        {"rule": Adam((0.5, 0.8), 1e-3), "decoupled_weight_decay": 0.2},
        lambda p: torch.optim.AdamW(p, 0.1, betas=(0.5, 0.8), eps=1e-3, weight_decay=0.2),
    ),
    "rmsprop": ({"rule": RMSprop()}, lambda p: torch.optim.RMSprop(p, 0.1)),
    "rmsprop, centered, momentum": (
        {"rule": RMSprop(0.7, 1e-3, momentum=0.6, centered=True), "weight_decay": 0.1},
        lambda p: torch.optim.RMSprop(p, 0.1, 0.7, 1e-3, momentum=0.6, centered=True, weight_decay=0.1),
    ),
    "adagrad": ({"rule": Adagrad()}, lambda p: torch.optim.Adagrad(p, 0.1)),
    "adagrad, decreasing": (
        {"rule": Adagrad(1e-3, 0.2), "lr_scale": lambda k, name: 1 / (1 + 0.5 * k)},
        lambda p: torch.optim.Adagrad(p, 0.1, eps=1e-3, initial_accumulator_value=0.2, lr_decay=0.5),
    ),
    "groups": (
        {"lr_scale": lambda k, name: 0.3 if name.endswith("bias") else 1.0},
        lambda p: torch.optim.SGD([{"params": [w], "lr": 0.03 if w.ndim == 1 else 0.1} for w in p]),
    ),
    "clipping": ({"rule": Momentum(0.8), "clip_norm": 0.2}, lambda p: torch.optim.SGD(p, 0.1, momentum=0.8)),
}


@pytest.mark.parametrize("name", RULES)
def test_steps_equal_torch_optimizer(name: str) -> None:
    settings, optimizer_of = RULES[name]
    # No BatchNorm: a bias before it has rounding for a gradient, which Adam scales up.
    module, episodes = MLP(4, 3, hidden=(6,), batch_norm=False).double(), vectors()
    forward, theta = functionalize(module)
    fast = adapt(forward, theta, episodes.support_x, episodes.support_y, InnerLoop(0.1, 4, **settings))
    for t in range(episodes.tasks):
        own = {n: p.clone().requires_grad_() for n, p in theta.items()}
        optimizer = optimizer_of(own.values())
        for _ in range(4):
            optimizer.zero_grad()
            cross_entropy(functional_call(module, own, episodes.support_x[t]), episodes.support_y[t]).backward()
            if largest := settings.get("clip_norm"):
                clip_grad_norm_(own.values(), largest)
            optimizer.step()
        for n, p in own.items():
            torch.testing.assert_close(fast[n][t], p.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rule", [Adam(), RMSprop(), RMSprop(centered=True, momentum=0.5), Adagrad()])
def test_derivative_is_finite_at_zero_gradients(rule: Any) -> None:
    forward, theta = functionalize(nn.Linear(3, 2).double())
    theta = {name: p.requires_grad_() for name, p in theta.items()}
    x, y = torch.randn(2, 4, 3, dtype=torch.float64), torch.tensor([[0, 1, 0, 1]] * 2)
    x[..., 1] = 0  # the weights of this input have no gradient
    fast = adapt(forward, theta, x, y, InnerLoop(0.1, 2, rule=rule))
    total = torch.stack([w.square().sum() for w in fast.values()]).sum()
    grads = torch.autograd.grad(total, list(theta.values()))
    assert all(torch.isfinite(g).all() for g in grads)


def test_centered_rmsprop_does_not_cancel() -> None:
    rule = RMSprop(0.5, centered=True)  # torch.optim.RMSprop gives NaN
    grads = {"w": torch.full((1, 1), 0.3, dtype=torch.float64)}
    state = rule.init(grads)
    for k in range(60):
        directions, state = rule.update(k, grads, state)
        variance = 0.3**2 * 0.5 ** (k + 1) * (1 - 0.5 ** (k + 1))  # of k + 1 values in an average from 0
        torch.testing.assert_close(state["square::w"].item(), variance, rtol=1e-9, atol=0)
    assert directions["w"].isfinite()
    with pytest.raises(ValueError, match=r"decay=0 with centered=True"):
        RMSprop(0.0, centered=True)


def test_proximal_steps_reach_proximal_optimum() -> None:
    forward, theta = functionalize(nn.Linear(3, 2).double())
    x, y = torch.randn(1, 4, 3, dtype=torch.float64), torch.tensor([[0, 1, 0, 1]])
    fast = {n: w[0] for n, w in adapt(forward, theta, x, y, InnerLoop(0.1, 2000, proximal_weight=2.0)).items()}
    at = {n: w.requires_grad_() for n, w in fast.items()}
    grads = torch.autograd.grad(cross_entropy(forward(at, x[0]), y[0]), list(at.values()))
    for (n, w), g in zip(at.items(), grads, strict=True):  # where it ends, g + 2 (phi - theta) = 0
        torch.testing.assert_close(g, -2.0 * (w - theta[n]), atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("second_order", [True, False])
def test_fast_weights_carry_second_derivatives_in_second_order(second_order: bool) -> None:
    forward, theta = functionalize(nn.Linear(2, 2).double())
    theta = {name: p.requires_grad_() for name, p in theta.items()}
    x, y = torch.randn(1, 3, 2, dtype=torch.float64), torch.tensor([[0, 1, 1]])
    fast = adapt(forward, theta, x, y, InnerLoop(lr=0.5, steps=1, second_order=second_order))
    # d(bias - lr g_bias) / d(weight) is a block of the Hessian in second order, and nothing in first order.
    (jacobian,) = torch.autograd.grad(fast["bias"][0, 0], [theta["weight"]], materialize_grads=True)
    assert bool(jacobian.ne(0).any()) == second_order


def test_graph_only_where_a_gradient_is_required() -> None:
    forward, theta = functionalize(nn.Linear(2, 2))
    x, y, inner = torch.randn(1, 3, 2), torch.tensor([[0, 1, 1]]), InnerLoop(lr=0.5, steps=2)
    plain = adapt(forward, theta, x, y, inner)
    theta["bias"].requires_grad_()
    fast = adapt(forward, theta, x, y, inner)
    with torch.no_grad():
        under_no_grad = adapt(forward, theta, x, y, inner)
    for other in (fast, under_no_grad):
        torch.testing.assert_close(other, plain)
    assert fast["bias"].requires_grad
    assert not any(w.requires_grad for w in (*plain.values(), *under_no_grad.values()))


def test_zero_steps_return_meta_parameters() -> None:
    forward, theta = functionalize(nn.Linear(2, 2))
    fast = adapt(forward, theta, torch.randn(4, 3, 2), torch.zeros(4, 3).long(), InnerLoop(lr=0.5, steps=0))
    torch.testing.assert_close(fast["weight"], theta["weight"].expand(4, 2, 2))


def test_dropout_mask_differs_between_tasks() -> None:
    forward, theta = functionalize(nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 2)))
    x = torch.ones(2, 1, 64)
    fast = adapt(forward, theta, x, torch.zeros(2, 1).long(), InnerLoop(lr=1.0, steps=1))
    assert not torch.equal(fast["1.weight"][0], fast["1.weight"][1])


def test_adapt_raises_without_task_dimension() -> None:
    forward, theta = functionalize(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"support_y has shape \(3,\); it must lead with \[tasks, examples\]"):
        adapt(forward, theta, torch.randn(3, 2), torch.tensor([0, 1, 1]), InnerLoop(lr=0.5, steps=1))


def test_predict_raises_for_examples_of_another_number_of_tasks() -> None:
    forward, theta = functionalize(nn.Linear(2, 2))
    fast = adapt(forward, theta, torch.randn(4, 3, 2), torch.zeros(4, 3).long(), InnerLoop(lr=0.5, steps=1))
    with pytest.raises(ValueError, match=r"x is \[50, 2\], the examples of 50 tasks, .* of 4\. .* x\[None\]"):
        predict(forward, fast, torch.randn(50, 2))


@pytest.mark.parametrize("with_query_loss", [False, True])
@pytest.mark.parametrize(
    ("loss", "targets", "message"),
    [
        (cross_entropy, (2, 5, 1), r"cross_entropy: .* \[5, 1\], .* always 0\. .*loss=mse_loss"),
        (nn.CrossEntropyLoss(), (2, 5, 1), r"CrossEntropyLoss: .* always 0"),
        (mse_loss, (2, 5), r"mse_loss: .*predictions are \[5, 1\] and its targets \[5\]"),
        (l1_loss, (2, 5, 5), r"l1_loss: .*predictions are \[5, 1\] and its targets \[5, 5\]"),
        (nn.MSELoss(), (2, 5), r"MSELoss: .*predictions are \[5, 1\] and its targets \[5\]"),
    ],
)
def test_loss_of_other_shapes_raises(loss: Any, targets: tuple[int, ...], message: str, with_query_loss: bool) -> None:
    forward, theta = functionalize(nn.Linear(3, 1))
    x, y = torch.randn(2, 5, 3), torch.randn(targets)
    query_loss = (lambda prediction, y: prediction.mean()) if with_query_loss else None
    with pytest.raises(ValueError, match=message):
        meta_gradient(
            forward, theta, Episodes(x, y, x, y), InnerLoop(lr=0.5, steps=1), loss=loss, query_loss=query_loss
        )
