"""Adaptation itself: its result, its graph and its settings."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from metalearn import InnerLoop, adapt, functionalize
from metalearn.models import Conv4
from tests.factories import image_episodes


def test_adapt_equals_sgd_on_each_task() -> None:
    module = Conv4(3, width=4).double()
    forward, theta = functionalize(module)
    episodes = image_episodes()
    fast = adapt(forward, theta, episodes.support_x, episodes.support_y, InnerLoop(lr=0.1, steps=3))

    for t in range(episodes.tasks):
        module.load_state_dict(theta)
        sgd = torch.optim.SGD(module.parameters(), lr=0.1)
        for _ in range(3):
            sgd.zero_grad()
            cross_entropy(module(episodes.support_x[t]), episodes.support_y[t]).backward()
            sgd.step()
        for name, p in module.named_parameters():
            torch.testing.assert_close(fast[name][t], p.detach(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("second_order", [True, False])
def test_fast_weights_carry_second_derivatives_in_second_order(second_order: bool) -> None:
    forward, theta = functionalize(nn.Linear(2, 2).double())
    theta = {name: p.requires_grad_() for name, p in theta.items()}
    x, y = torch.randn(1, 3, 2, dtype=torch.float64), torch.tensor([[0, 1, 1]])
    fast = adapt(forward, theta, x, y, InnerLoop(lr=0.5, steps=1, second_order=second_order))
    # d(bias - lr g_bias) / d(weight) is a block of the Hessian in second order, and nothing in first order.
    (jacobian,) = torch.autograd.grad(fast["bias"][0, 0], [theta["weight"]], materialize_grads=True)
    assert bool(jacobian.ne(0).any()) == second_order


def test_adapt_when_some_parameters_require_no_gradient() -> None:
    forward, theta = functionalize(nn.Linear(2, 2))
    theta["bias"].requires_grad_()
    x, y = torch.randn(1, 3, 2), torch.tensor([[0, 1, 1]])
    fast = adapt(forward, theta, x, y, InnerLoop(lr=0.5, steps=2))
    plain = adapt(forward, {n: p.detach() for n, p in theta.items()}, x, y, InnerLoop(lr=0.5, steps=2))
    torch.testing.assert_close(fast, plain)
    assert fast["bias"].requires_grad


def test_no_graph_without_required_gradients() -> None:
    forward, theta = functionalize(nn.Linear(2, 2))
    x, y = torch.randn(1, 3, 2), torch.tensor([[0, 1, 1]])
    plain = adapt(forward, theta, x, y, InnerLoop(lr=0.5, steps=2))
    assert not any(w.requires_grad for w in plain.values())
    theta = {name: p.requires_grad_() for name, p in theta.items()}
    with torch.no_grad():
        under_no_grad = adapt(forward, theta, x, y, InnerLoop(lr=0.5, steps=2))
    assert not any(w.requires_grad for w in under_no_grad.values())
    torch.testing.assert_close(under_no_grad, plain)


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
