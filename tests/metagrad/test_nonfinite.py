"""Non-finite losses and meta-gradients raise with their task and inner step, unless the caller defers the check."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from metalearn import Episodes, InnerLoop, Params, adapt, functionalize, meta_gradient
from metalearn.core.errors import NonFiniteGradientError, NonFiniteLossError
from metalearn.inner.diagnostics import check_losses_finite, defer_loss_checks
from metalearn.metagrad import ENGINES
from tests.metagrad.models import linear_on_sequences
from tests.metagrad.settings import sequences

DOUBLE = torch.float64
LOSSES = [torch.tensor([1.0, math.inf])]


def test_deferred_check_does_nothing_inside_and_raises_outside() -> None:
    with defer_loss_checks():
        check_losses_finite(LOSSES)
        with defer_loss_checks():
            check_losses_finite(LOSSES)
        check_losses_finite(LOSSES)
        with ThreadPoolExecutor() as other_threads:
            error = other_threads.submit(check_losses_finite, LOSSES).exception()
    assert isinstance(error, NonFiniteLossError), "another thread defers nothing"
    with pytest.raises(KeyError), defer_loss_checks():
        raise KeyError
    with pytest.raises(NonFiniteLossError, match="the support loss of task 1 is inf after 0 inner steps"):
        check_losses_finite(LOSSES)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize(("kind", "step"), [("support", 0), ("query", 2)])
def test_nan_loss_raises_with_task_and_step(kind: str, step: int, chunk: int | None, engine: str) -> None:
    forward, theta = functionalize(linear_on_sequences())
    episodes = sequences(5)
    getattr(episodes, f"{kind}_x")[3, 0] = math.nan
    inner = InnerLoop(lr=0.1, steps=2, engine=engine, task_chunk=chunk)
    message = f"the {kind} loss of task 3 is nan after {step} inner steps"
    with pytest.raises(NonFiniteLossError, match=message) as caught:
        meta_gradient(forward, theta, episodes, inner)
    assert (caught.value.kind, caught.value.task, caught.value.step) == (kind, 3, step)
    if kind == "support":
        with pytest.raises(NonFiniteLossError, match=message):
            adapt(forward, theta, episodes.support_x, episodes.support_y, inner)


@pytest.mark.parametrize("engine", ENGINES)
def test_diverging_inner_loop_raises_with_remedy(engine: str) -> None:
    # L(w) = w^4 / 4 from w = 1 with lr = 1e4 overshoots to -1e4, 1e16, ...: infinite in float32 within some steps.
    def forward(params: Params, x: Tensor) -> Tensor:
        return params["w"] ** 4 / 4 * torch.ones_like(x[:, 0])

    x, theta = torch.ones(1, 1, 1), {"w": torch.tensor(1.0)}
    inner = InnerLoop(lr=1e4, steps=8, engine=engine)
    with pytest.raises(NonFiniteLossError, match=r"one step earlier; take a smaller inner\.lr or fewer inner\.steps"):
        meta_gradient(forward, theta, Episodes(x, x, x, x), inner, loss=lambda prediction, target: prediction.mean())


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
