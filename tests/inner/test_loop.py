"""Adaptation itself: its result, its graph and its settings."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from metalearn import InnerLoop, adapt, functionalize
from metalearn.models import Conv4
from tests.factories import image_episodes


def test_equals_sgd_on_each_task_alone() -> None:
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
def test_result_is_differentiable_in_params_that_require_it(second_order: bool) -> None:
    forward, theta = functionalize(nn.Linear(2, 2).double())
    theta = {name: p.requires_grad_() for name, p in theta.items()}
    x, y = torch.randn(1, 3, 2, dtype=torch.float64), torch.tensor([[0, 1, 1]])
    fast = adapt(forward, theta, x, y, InnerLoop(lr=0.5, steps=1, second_order=second_order))
    # d(bias - lr g_bias) / d(weight) is a block of the Hessian in second order, and nothing in first order.
    (jacobian,) = torch.autograd.grad(fast["bias"][0, 0], [theta["weight"]], materialize_grads=True)
    assert bool(jacobian.ne(0).any()) == second_order


def test_only_some_parameters_require_a_gradient() -> None:
    forward, theta = functionalize(nn.Linear(2, 2))
    theta["bias"].requires_grad_()
    x, y = torch.randn(1, 3, 2), torch.tensor([[0, 1, 1]])
    fast = adapt(forward, theta, x, y, InnerLoop(lr=0.5, steps=2))
    plain = adapt(forward, {n: p.detach() for n, p in theta.items()}, x, y, InnerLoop(lr=0.5, steps=2))
    torch.testing.assert_close(fast, plain)
    assert fast["bias"].requires_grad


def test_no_graph_where_none_is_wanted() -> None:
    forward, theta = functionalize(nn.Linear(2, 2))
    x, y = torch.randn(1, 3, 2), torch.tensor([[0, 1, 1]])
    plain = adapt(forward, theta, x, y, InnerLoop(lr=0.5, steps=2))
    assert not any(w.requires_grad for w in plain.values())
    theta = {name: p.requires_grad_() for name, p in theta.items()}
    with torch.no_grad():
        under_no_grad = adapt(forward, theta, x, y, InnerLoop(lr=0.5, steps=2))
    assert not any(w.requires_grad for w in under_no_grad.values())
    torch.testing.assert_close(under_no_grad, plain)


def test_zero_steps_are_the_meta_parameters() -> None:
    forward, theta = functionalize(nn.Linear(2, 2))
    fast = adapt(forward, theta, torch.randn(4, 3, 2), torch.zeros(4, 3).long(), InnerLoop(lr=0.5, steps=0))
    torch.testing.assert_close(fast["weight"], theta["weight"].expand(4, 2, 2))


def test_dropout_draws_another_mask_for_every_task() -> None:
    forward, theta = functionalize(nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 2)))
    x = torch.ones(2, 1, 64)
    fast = adapt(forward, theta, x, torch.zeros(2, 1).long(), InnerLoop(lr=1.0, steps=1))
    assert not torch.equal(fast["1.weight"][0], fast["1.weight"][1])


def test_a_loss_of_several_numbers_is_refused() -> None:
    forward, theta = functionalize(nn.Linear(2, 2))
    x, y = torch.randn(1, 3, 2), torch.tensor([[0, 1, 1]])
    with pytest.raises(ValueError, match=r"gave \(3,\) numbers for a task and must give one.*reduction='mean'"):
        adapt(forward, theta, x, y, InnerLoop(lr=0.5, steps=1), loss=partial(cross_entropy, reduction="none"))


def test_one_task_without_a_task_dimension_is_refused() -> None:
    forward, theta = functionalize(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"support_y has shape \(3,\); it must lead with \[tasks, examples\]"):
        adapt(forward, theta, torch.randn(3, 2), torch.tensor([0, 1, 1]), InnerLoop(lr=0.5, steps=1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0, "steps": 1}, "lr=0.0; it must be a positive number"),
        ({"lr": "0.1", "steps": 1}, "lr='0.1'; it must be a positive number"),
        ({"lr": 0.1, "steps": True}, "steps=True; it must be a whole number"),
        ({"lr": 0.1, "steps": 1, "task_chunk": 1.5}, "task_chunk=1.5; it must be at least 1"),
        ({"lr": 0.1, "steps": 1.5}, "steps=1.5; it must be a whole number"),
        ({"lr": float("nan"), "steps": 1}, "lr=nan"),
        ({"lr": 0.1, "steps": -1}, "steps=-1; it must be a whole number, 0 or more"),
        ({"lr": 0.1, "steps": 1, "task_chunk": 0}, "task_chunk=0; it must be at least 1, or None"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        InnerLoop(**settings)  # type: ignore[arg-type]
