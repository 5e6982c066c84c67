"""Update rules against torch's optimizers, one task at a time; initializers against their definition."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from metalearn import InnerLoop, adapt, functionalize, predict
from metalearn.inner import Adam, Momentum, PrototypeHead, ZeroContext
from metalearn.models import MLP, Conv4
from tests.factories import image_episodes
from tests.metagrad.settings import vectors

RULES: dict[str, tuple[dict[str, Any], Callable[[Iterable[Tensor]], torch.optim.Optimizer]]] = {
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


def test_adam_derivative_is_finite_at_zero_gradients() -> None:
    forward, theta = functionalize(torch.nn.Linear(3, 2).double())
    theta = {name: p.requires_grad_() for name, p in theta.items()}
    x, y = torch.randn(2, 4, 3, dtype=torch.float64), torch.tensor([[0, 1, 0, 1]] * 2)
    x[..., 1] = 0  # the weights of this input have no gradient
    fast = adapt(forward, theta, x, y, InnerLoop(0.1, 2, rule=Adam()))
    total = torch.stack([w.square().sum() for w in fast.values()]).sum()
    grads = torch.autograd.grad(total, list(theta.values()))
    assert all(torch.isfinite(g).all() for g in grads)


def test_proximal_steps_reach_proximal_optimum() -> None:
    forward, theta = functionalize(torch.nn.Linear(3, 2).double())
    x, y = torch.randn(1, 4, 3, dtype=torch.float64), torch.tensor([[0, 1, 0, 1]])
    fast = {n: w[0] for n, w in adapt(forward, theta, x, y, InnerLoop(0.1, 2000, proximal_weight=2.0)).items()}
    at = {n: w.requires_grad_() for n, w in fast.items()}
    grads = torch.autograd.grad(cross_entropy(forward(at, x[0]), y[0]), list(at.values()))
    for (n, w), g in zip(at.items(), grads, strict=True):  # where it ends, g + 2 (phi - theta) = 0
        torch.testing.assert_close(g, -2.0 * (w - theta[n]), atol=1e-9, rtol=1e-6)


def test_prototype_head_predicts_nearest_class_mean() -> None:
    module, episodes = Conv4(3, width=6).double(), image_episodes(shots=2)
    forward, theta = functionalize(module)
    inner = InnerLoop(0.1, 0, initializer=PrototypeHead("head.weight", "head.bias"))
    fast = adapt(forward, theta, episodes.support_x, episodes.support_y, inner)
    got = predict(forward, fast, episodes.query_x).log_softmax(-1)
    for t in range(episodes.tasks):
        support, query = (module.features(x[t]).mean((-2, -1)) for x in (episodes.support_x, episodes.query_x))
        means = torch.stack([support[episodes.support_y[t] == n].mean(0) for n in range(3)])
        expected = (-torch.cdist(query, means).square()).log_softmax(-1)
        torch.testing.assert_close(got[t], expected.detach())


def test_zero_context_starts_from_zero() -> None:
    forward, theta = functionalize(MLP(4, 3, hidden=(6,)).double())
    episodes, names = vectors(), frozenset({"layers.4.bias"})
    inner = InnerLoop(0.1, 0, adapted_params=names, initializer=ZeroContext(names))
    fast = adapt(forward, theta, episodes.support_x, episodes.support_y, inner)
    assert not fast["layers.4.bias"].any()
    assert torch.equal(fast["layers.1.weight"][2], theta["layers.1.weight"])
