"""A non-finite meta-gradient of finite losses raises with its parameter, task and inner step."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from metalearn import Episodes, InnerLoop, Params, meta_gradient
from metalearn.core.errors import NonFiniteGradientError
from metalearn.inner.diagnostics import defer_loss_checks
from metalearn.metagrad import ENGINES

DOUBLE = torch.float64


def penalised(params: Params, x: Tensor) -> Tensor:
    """Add a norm that is 0 where x is 0: finite, but its second derivative is not."""
    penalty: Tensor = (params["bias"] * x[0, 0]).norm() ** 2
    return x @ params["w"] + penalty


def tasks(*, bad: int, of: int = 5) -> Episodes:
    x = torch.rand(of, 4, 2, dtype=DOUBLE) + 0.5
    x[bad, 0, 0] = 0
    y = torch.rand(of, 4, dtype=DOUBLE)
    return Episodes(x, y, x, y)


THETA = {"w": torch.ones(2, dtype=DOUBLE), "bias": torch.ones(3, dtype=DOUBLE)}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("chunk", [None, 2])
def test_nonfinite_gradient_raises_with_parameter_and_task(chunk: int | None, engine: str) -> None:
    inner = InnerLoop(lr=0.01, steps=2, engine=engine, task_chunk=chunk)
    with pytest.raises(NonFiniteGradientError, match=r"of task 3 is nan in parameter 'w' .*infinite at 0") as caught:
        meta_gradient(penalised, THETA, tasks(bad=3), inner, loss=mse_loss)
    assert (caught.value.task, caught.value.parameter) == (3, "w")
    assert caught.value.step is not None
    first = InnerLoop(lr=0.01, steps=2, engine=engine, second_order=False)
    assert torch.isfinite(meta_gradient(penalised, THETA, tasks(bad=3), first, loss=mse_loss).grads["bias"]).all()


def test_deferred_check_returns_nonfinite_gradient() -> None:
    with defer_loss_checks():
        result = meta_gradient(penalised, THETA, tasks(bad=0), InnerLoop(lr=0.01, steps=1), loss=mse_loss)
    assert result.grads["bias"].isnan().any()


@dataclass(frozen=True)
class BareRoot:
    """Divides by the root of the gradient's square: 0/0 where that is 0."""

    def init(self, fast: Params) -> Params:
        return {}

    def update(self, k: int, grads: Params, state: Params) -> tuple[Params, Params]:
        return {name: g / ((g * g).sqrt() + 1e-3) for name, g in grads.items()}, state


@pytest.mark.parametrize("engine", ENGINES)
def test_rule_with_infinite_derivative_raises(engine: str) -> None:
    def forward(params: Params, x: Tensor) -> Tensor:
        return x @ params["w"] + 0 * params["bias"].sum()

    inner = InnerLoop(lr=0.01, steps=1, rule=BareRoot(), engine=engine)
    with pytest.raises(NonFiniteGradientError, match=r"of task 0 is nan in parameter"):
        meta_gradient(forward, THETA, tasks(bad=0), inner, loss=mse_loss)
