"""Reptile against torch's optimizers, one task at a time, and against joint training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from metalearn import Episodes, InnerLoop, functionalize
from metalearn.core.errors import NonFiniteLossError
from metalearn.core.params import relative_error
from metalearn.inner import Adam, MetaCurvature, Momentum, ZeroContext
from metalearn.metagrad.reptile import reptile
from metalearn.models import MLP
from tests.metagrad.settings import HEAD, small_mlp, vectors

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
RULES: dict[str, tuple[dict[str, Any], MakeOptimizer]] = {
    "sgd": ({}, lambda own: torch.optim.SGD(own, lr=0.2)),
    "momentum": ({"rule": Momentum(0.8)}, lambda own: torch.optim.SGD(own, lr=0.2, momentum=0.8)),
    # The paper's, but for eps: a bias before BatchNorm has a gradient of rounding errors, which Adam divides by eps.
    "adam": (
        {"rule": Adam((0.0, 0.999), eps=1e-5)},
        lambda own: torch.optim.Adam(own, lr=0.2, betas=(0.0, 0.999), eps=1e-5),
    ),
    "head alone": ({"adapted_params": HEAD}, lambda own: torch.optim.SGD(own, lr=0.2)),
}


def all_examples(episodes: Episodes, t: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the support and query examples of a task."""
    x = torch.cat([episodes.support_x[t], episodes.query_x[t]])
    return x, torch.cat([episodes.support_y[t], episodes.query_y[t]])


@pytest.mark.parametrize("rule", RULES)
def test_displacement_equals_plain_loop(rule: str) -> None:
    settings, optimizer = RULES[rule]
    module = MLP(4, 3, hidden=(6,)).double()
    forward, theta = functionalize(module)
    inner, episodes = InnerLoop(0.2, 4, **settings), vectors()
    total = {name: torch.zeros_like(p) for name, p in theta.items()}
    query_losses, support_losses = [], []
    for t in range(episodes.tasks):
        copied, (x, y) = copy.deepcopy(module), all_examples(episodes, t)
        own = [p for n, p in copied.named_parameters() if inner.adapted_params is None or n in inner.adapted_params]
        steps = optimizer(own)
        for _ in range(inner.steps):
            steps.zero_grad()
            loss = cross_entropy(copied(x), y)
            loss.backward()
            steps.step()
            support_losses.append(loss.item())
        for name, p in copied.named_parameters():
            total[name] += (theta[name] - p.detach()) / 0.2 / episodes.tasks
        query_losses.append(cross_entropy(copied(episodes.query_x[t]), episodes.query_y[t]).item())

    got = reptile(forward, theta, episodes, inner, cross_entropy)
    assert relative_error(got.grads, total) < 1e-9
    moved = (inner.adapted_params or theta.keys()) - {"layers.1.bias"}  # the BatchNorm after it removes it
    assert all(got.grads[name].norm() > 0 for name in moved)
    assert all(not got.grads[name].any() for name in theta.keys() - (inner.adapted_params or theta.keys()))
    assert got.loss.item() == pytest.approx(sum(query_losses) / episodes.tasks)
    by_step = torch.tensor(support_losses, dtype=torch.float64).view(episodes.tasks, -1).mean(dim=0)
    torch.testing.assert_close(got.support_loss, by_step)
    assert got.predictions.shape == (3, 9, 3)
    assert not got.predictions.requires_grad


def test_one_step_equals_gradient_of_joint_training() -> None:
    forward, theta = small_mlp()
    episodes = vectors()
    at = {name: p.clone().requires_grad_() for name, p in theta.items()}
    losses = [cross_entropy(forward(at, x), y) for x, y in (all_examples(episodes, t) for t in range(episodes.tasks))]
    expected = torch.autograd.grad(torch.stack(losses).mean(), list(at.values()))
    got = reptile(forward, theta, episodes, InnerLoop(1e-2, 1), cross_entropy)
    assert relative_error(got.grads, dict(zip(theta, expected, strict=True))) < 1e-12


def test_second_order_changes_nothing() -> None:
    forward, theta = small_mlp()
    episodes = vectors()
    first, second = (
        reptile(forward, theta, episodes, InnerLoop(0.2, 3, second_order=order), cross_entropy)
        for order in (False, True)
    )
    assert all(torch.equal(first.grads[name], second.grads[name]) for name in theta)


def test_theta_that_requires_gradients_is_not_changed() -> None:
    forward, theta = small_mlp()
    before = {name: p.clone() for name, p in theta.items()}
    at = {name: p.requires_grad_() for name, p in theta.items()}
    got = reptile(forward, at, vectors(), InnerLoop(0.2, 2), cross_entropy)
    assert not any(g.requires_grad for g in got.grads.values())
    assert all(torch.equal(before[name], p) for name, p in at.items())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learned_lr", "layer"),
        ("transform", MetaCurvature()),
        ("query_weights", (0.0, 0.5, 0.5)),
        ("per_step_params", {"layers.2.weight"}),
        ("initializer", ZeroContext(frozenset({"layers.4.bias"}))),
    ],
)
def test_unsupported_setting_raises(name: str, value: Any) -> None:
    forward, theta = small_mlp()
    with pytest.raises(ValueError, match=rf"reptile: inner\.{name}=.* has no gradient for"):
        reptile(forward, theta, vectors(), InnerLoop(0.2, 2, **{name: value}), cross_entropy)


def test_nonfinite_loss_raises() -> None:
    forward, theta = functionalize(nn.Linear(4, 3).double())
    episodes = vectors()
    episodes.query_x[1] = torch.inf  # which the first step is adapted to
    with pytest.raises(NonFiniteLossError, match="task 1"):
        reptile(forward, theta, episodes, InnerLoop(0.2, 2), cross_entropy)
