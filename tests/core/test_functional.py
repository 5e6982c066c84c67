"""Modules as pure functions of their parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from metalearn import Episodes, InnerLoop, adapt, functionalize, meta_gradient, predict


def test_params_are_copies() -> None:
    module = nn.Linear(2, 2)
    before = module.weight.detach().clone()
    forward, theta = functionalize(module)
    theta["weight"].zero_()
    torch.testing.assert_close(module.weight.detach(), before, rtol=0, atol=0)
    assert forward(theta, torch.ones(1, 2)).tolist() == [module.bias.tolist()]


def test_constants_move_with_the_module() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()
    forward, theta = functionalize(module)
    module.double()
    moved = {name: p.double() for name, p in theta.items()}
    assert forward(moved, torch.ones(3, 2, dtype=torch.float64)).dtype == torch.float64


def test_forward_raises_when_module_returns_more_than_tensors() -> None:
    class Half(nn.Linear):
        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x), 3

    forward, theta = functionalize(Half(2, 2))
    with pytest.raises(
        TypeError, match="Half returns int as its prediction\\[1\\], and must return a tensor, or a tuple"
    ):
        forward(theta, torch.zeros(1, 2))


def test_forward_raises_on_unknown_names() -> None:
    forward, theta = functionalize(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"params names 'wieght', which Linear does not have; it has bias, weight"):
        forward({"wieght": theta["weight"], "bias": theta["bias"]}, torch.zeros(1, 2))
    forward({"bias": theta["bias"]}, torch.zeros(1, 2))  # the module's own weight is a constant then


def test_tied_parameters_appear_once() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    forward, theta = functionalize(module)
    assert set(theta) == {"0.weight", "0.bias", "1.bias"}
    doubled = {**theta, "0.weight": 2 * theta["0.weight"]}
    x = torch.randn(2, 3)
    expected = (x @ doubled["0.weight"].T + theta["0.bias"]) @ doubled["0.weight"].T + theta["1.bias"]
    torch.testing.assert_close(forward(doubled, x), expected)
    by_its_other_name = {"1.weight": doubled["0.weight"], "0.bias": theta["0.bias"], "1.bias": theta["1.bias"]}
    torch.testing.assert_close(forward(by_its_other_name, x), expected)


def test_module_instead_of_forward_raises() -> None:
    module, x, y = nn.Linear(3, 2), torch.randn(2, 4, 3), torch.zeros(2, 4, dtype=torch.int64)
    _, theta = functionalize(module)
    fast = {name: p.expand(2, *p.shape) for name, p in theta.items()}
    for call in (
        lambda: meta_gradient(module, theta, Episodes(x, y, x, y), InnerLoop(lr=0.1, steps=1)),
        lambda: adapt(module, theta, x, y, InnerLoop(lr=0.1, steps=1)),
        lambda: predict(module, fast, x),
    ):
        with pytest.raises(TypeError, match=r"^forward is Linear .*functionalize\(model\)"):
            call()
