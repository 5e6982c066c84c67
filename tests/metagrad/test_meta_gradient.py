"""The meta-gradient against closed forms, a loop by hand and differences, and properties of every engine; float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, mse_loss

from metalearn import Episodes, InnerLoop, Params, adapt, functionalize, meta_gradient
from metalearn.core.params import grad_of, relative_error
from metalearn.inner import task_losses
from metalearn.metagrad import ENGINES
from metalearn.metagrad.baselines.by_hand import meta_gradient as by_hand
from metalearn.models import Conv4
from tests.factories import image_episodes
from tests.metagrad.models import MODELS
from tests.metagrad.settings import assert_equal

DOUBLE = torch.float64
over_engines = pytest.mark.parametrize("engine", ENGINES)
over_orders = pytest.mark.parametrize("second_order", [True, False])


@over_engines
@over_orders
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_quadratic_closed_form(engine: str, second_order: bool, steps: int) -> None:
    # Linear least squares: L_support(w) = |X w - y|^2 / S has the constant Hessian H = 2 X'X / S and the minimum s, so
    # w_K - s = (I - lr H)^K (w - s), and with the query gradient g_q(w) = 2 Z'(Z w - u) / Q:
    #   second order: dL_query(w_K)/dw = (I - lr H)^K g_q(w_K);      first order: g_q(w_K).
    shapes = ((4, 7, 3), (4, 7), (4, 5, 3), (4, 5))
    episodes = Episodes(*(torch.randn(*shape, dtype=DOUBLE) for shape in shapes))
    w, lr = torch.randn(3, dtype=DOUBLE), 0.05
    expected = torch.zeros(3, dtype=DOUBLE)
    for x, y, z, u in zip(*vars(episodes).values(), strict=True):
        hessian = 2 * x.T @ x / len(x)
        s = torch.linalg.solve(x.T @ x, x.T @ y)
        shrink = torch.linalg.matrix_power(torch.eye(3, dtype=DOUBLE) - lr * hessian, steps)
        adapted = s + shrink @ (w - s)
        query_gradient = 2 * z.T @ (z @ adapted - u) / len(z)
        expected += (shrink @ query_gradient if second_order else query_gradient) / 4

    inner = InnerLoop(lr=lr, steps=steps, second_order=second_order, engine=engine)
    result = meta_gradient(lambda params, x: x @ params["w"], {"w": w}, episodes, inner, loss=mse_loss)

    torch.testing.assert_close(result.grads["w"], expected, rtol=1e-12, atol=1e-12)


@over_engines
@over_orders
@pytest.mark.parametrize("model", MODELS)
def test_equals_loop_by_hand(model: str, second_order: bool, engine: str) -> None:
    module, episodes = MODELS[model]().double(), image_episodes()
    inner = InnerLoop(lr=0.1, steps=2, second_order=second_order, engine=engine)
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention cannot be differentiated twice
        expected = by_hand(module, episodes, inner)
        other = by_hand(module, episodes, dataclasses.replace(inner, second_order=not second_order))

    result = meta_gradient(*functionalize(module), episodes, inner)

    assert_equal(result, expected, within=1e-10)
    assert all(g.abs().max() > 1e-12 for g in result.grads.values()) or model != "conv4", "each gets a gradient"
    assert relative_error(result.grads, other.grads) > 1e-2, "first and second order must differ here"
    assert not any(t.requires_grad for t in (result.loss, result.predictions, result.support_loss))


@over_engines
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("model", MODELS)
def test_second_order_equals_finite_differences(model: str, steps: int, engine: str) -> None:
    forward, theta = functionalize(MODELS[model]().double())
    episodes = image_episodes(shots=4, queries=4)  # BatchNorm over very few examples has too many kinks
    inner = InnerLoop(lr=0.05, steps=steps, engine=engine)
    grads = meta_gradient(forward, theta, episodes, inner).grads
    eps = 1e-8  # small, as ReLU and max-pooling have kinks

    @torch.no_grad()
    def loss_at(name: str, moved: Tensor) -> float:
        fast = adapt(forward, {**theta, name: moved}, episodes.support_x, episodes.support_y, inner)
        return task_losses(forward, fast, episodes.query_x, episodes.query_y, loss=cross_entropy).losses.mean().item()

    # Along a random direction in each parameter by itself, so that no block of the gradient escapes; half of each is
    # the block's own gradient, so that the slope is not lost in the noise.
    for name, grad in grads.items():
        noise = torch.randn_like(grad)
        step = eps * (grad / grad.norm().clamp_min(1e-12) + noise / noise.norm())
        slope = (loss_at(name, theta[name] + step) - loss_at(name, theta[name] - step)) / (2 * eps)
        assert slope == pytest.approx((grad * step).sum().item() / eps, rel=1e-5, abs=1e-6), name


@over_orders
def test_inner_gradient_carries_a_graph_only_in_second_order(
    second_order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def spy(loss: Tensor, params: Params, *, create_graph: bool) -> Params:
        grads = grad_of(loss, params, create_graph=create_graph)
        seen.extend(g.grad_fn is not None for g in grads.values())
        return grads

    monkeypatch.setattr("metalearn.inner.loop.grad_of", spy)
    forward, theta = functionalize(Conv4(3, width=4).double())
    meta_gradient(forward, theta, image_episodes(), InnerLoop(lr=0.1, steps=2, second_order=second_order))
    assert seen == [second_order] * 2 * len(theta)


class TwoHeads(nn.Linear):
    """Uses one of its two heads."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.unused = nn.Linear(4, 3)


X, Y = torch.randn(2, 6, 4), torch.randint(3, (2, 6))


@over_engines
@over_orders
def test_unused_parameters_get_zero_gradients(second_order: bool, engine: str) -> None:
    inner = InnerLoop(lr=0.1, steps=2, second_order=second_order, engine=engine)
    grads = meta_gradient(*functionalize(TwoHeads()), Episodes(X, Y, X, Y), inner).grads
    assert {name for name, g in grads.items() if g.eq(0).all()} == {"unused.weight", "unused.bias"}


@over_engines
@pytest.mark.parametrize("steps", [0, 1])
def test_loss_that_depends_on_no_parameter_raises(steps: int, engine: str) -> None:
    def detached(prediction: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(prediction.detach(), target)

    inner = InnerLoop(lr=0.1, steps=steps, engine=engine)
    with pytest.raises(ValueError, match=r"depends on no parameter.*\.detach\(\)"):
        meta_gradient(*functionalize(TwoHeads()), Episodes(X, Y, X, Y), inner, loss=detached)


def test_parameters_are_not_changed() -> None:
    forward, theta = functionalize(Conv4(3, width=4))
    before = {name: p.clone() for name, p in theta.items()}
    meta_gradient(forward, theta, image_episodes(dtype=torch.float32), InnerLoop(lr=0.1, steps=1))
    assert all(torch.equal(p, before[n]) and not p.requires_grad and p.grad is None for n, p in theta.items())


def test_engine_that_a_training_chooses_raises() -> None:
    with pytest.raises(ValueError, match=r"engine='auto' is for training, which measures; take one of unroll, ch"):
        meta_gradient(*functionalize(TwoHeads()), Episodes(X, Y, X, Y), InnerLoop(lr=0.1, steps=1, engine="auto"))
