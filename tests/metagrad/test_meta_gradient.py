"""The meta-gradient against a hand-written loop, and properties of every engine, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from metalearn import Episodes, InnerLoop, Params, adapt, functionalize, meta_gradient
from metalearn.core.functional import grad_of, relative_error
from metalearn.metagrad import ENGINES
from metalearn.models import Conv4
from tests.factories import image_episodes
from tests.metagrad.models import MODELS


@sdpa_kernel(SDPBackend.MATH)  # the fused attention cannot be differentiated twice
def by_hand(module: nn.Module, episodes: Episodes, lr: float, steps: int, *, detach: bool) -> Params:
    """Compute the textbook loop over tasks with ``create_graph=True``, the inner gradients detached or not."""
    theta = {name: p.detach().requires_grad_() for name, p in module.named_parameters()}
    total = torch.zeros((), dtype=torch.float64)
    for t in range(episodes.tasks):
        fast = theta
        for _ in range(steps):
            logits = torch.func.functional_call(module, fast, (episodes.support_x[t],))
            loss = cross_entropy(logits, episodes.support_y[t])
            grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
            fast = {
                name: w - lr * (g.detach() if detach else g) for (name, w), g in zip(fast.items(), grads, strict=True)
            }
        logits = torch.func.functional_call(module, fast, (episodes.query_x[t],))
        total = total + cross_entropy(logits, episodes.query_y[t]) / episodes.tasks
    return dict(zip(theta, torch.autograd.grad(total, list(theta.values())), strict=True))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("model", MODELS)
def test_equals_hand_written_loop(model: str, second_order: bool, engine: str) -> None:
    module = MODELS[model]().double()
    episodes = image_episodes()
    expected = by_hand(module, episodes, lr=0.1, steps=2, detach=not second_order)
    other = by_hand(module, episodes, lr=0.1, steps=2, detach=second_order)

    forward, theta = functionalize(module)
    inner = InnerLoop(lr=0.1, steps=2, second_order=second_order, engine=engine)
    grads = meta_gradient(forward, theta, episodes, inner).grads

    assert relative_error(grads, expected) < 1e-10
    assert relative_error(grads, other) > 1e-2, "first and second order must differ here"


@pytest.mark.parametrize("second_order", [True, False])
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

    assert len(seen) == 2 * len(theta)
    assert set(seen) == {second_order}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("second_order", [True, False])
def test_every_parameter_gets_a_gradient(second_order: bool, engine: str) -> None:
    forward, theta = functionalize(Conv4(3, width=6).double())

    grads = meta_gradient(
        forward, theta, image_episodes(), InnerLoop(lr=0.1, steps=2, second_order=second_order, engine=engine)
    ).grads

    assert grads.keys() == theta.keys()
    for name, grad in grads.items():
        assert grad.shape == theta[name].shape
        assert torch.isfinite(grad).all(), name
        assert grad.abs().max() > 1e-12, name


class TwoHeads(nn.Module):
    """Uses one of its two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(4, 3)
        self.unused = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.used(x)
        return logits


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("second_order", [True, False])
def test_unused_parameters_get_zero_gradients(second_order: bool, engine: str) -> None:
    forward, theta = functionalize(TwoHeads())
    x, y = torch.randn(2, 6, 4), torch.randint(3, (2, 6))

    inner = InnerLoop(lr=0.1, steps=2, second_order=second_order, engine=engine)
    grads = meta_gradient(forward, theta, Episodes(x, y, x, y), inner).grads

    assert grads["unused.weight"].eq(0).all()
    assert grads["unused.bias"].eq(0).all()
    assert grads["used.weight"].ne(0).any()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("steps", [0, 1])
def test_loss_that_depends_on_no_parameter_raises(steps: int, engine: str) -> None:
    forward, theta = functionalize(TwoHeads())
    x, y = torch.randn(2, 6, 4), torch.randint(3, (2, 6))
    inner = InnerLoop(lr=0.1, steps=steps, engine=engine)

    def detached(prediction: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(prediction.detach(), target)

    with pytest.raises(ValueError, match=r"depends on no parameter.*\.detach\(\)"):
        meta_gradient(forward, theta, Episodes(x, y, x, y), inner, loss=detached)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("chunk", [1, 2, 5, 7])
def test_result_does_not_depend_on_task_chunk(chunk: int, engine: str) -> None:
    forward, theta = functionalize(Conv4(3, width=4).double())
    episodes = image_episodes(tasks=5)
    whole = meta_gradient(forward, theta, episodes, InnerLoop(lr=0.1, steps=2, engine=engine))
    parts = meta_gradient(forward, theta, episodes, InnerLoop(lr=0.1, steps=2, engine=engine, task_chunk=chunk))

    assert relative_error(parts.grads, whole.grads) < 1e-12
    torch.testing.assert_close(parts.loss, whole.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(parts.support_loss, whole.support_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(parts.predictions, whole.predictions, rtol=1e-10, atol=1e-12)


def test_predictions_and_support_loss_are_those_of_adapt() -> None:
    forward, theta = functionalize(Conv4(3, width=4).double())
    episodes = image_episodes()
    inner = InnerLoop(lr=0.1, steps=2)
    result = meta_gradient(forward, theta, episodes, inner)
    fast = adapt(forward, theta, episodes.support_x, episodes.support_y, inner)

    for t in range(episodes.tasks):
        logits = forward({name: w[t] for name, w in fast.items()}, episodes.query_x[t])
        torch.testing.assert_close(result.predictions[t], logits)
    first_support = [
        cross_entropy(forward(theta, x), y) for x, y in zip(episodes.support_x, episodes.support_y, strict=True)
    ]
    torch.testing.assert_close(result.support_loss[0], torch.stack(first_support).mean())
    assert not any(t.requires_grad for t in (result.loss, result.predictions, result.support_loss))


def test_parameters_are_not_changed() -> None:
    forward, theta = functionalize(Conv4(3, width=4))
    before = {name: p.clone() for name, p in theta.items()}

    meta_gradient(forward, theta, image_episodes(dtype=torch.float32), InnerLoop(lr=0.1, steps=1))

    for name, p in theta.items():
        assert torch.equal(p, before[name])
        assert not p.requires_grad
        assert p.grad is None


def test_no_grad_outside_changes_nothing() -> None:
    forward, theta = functionalize(Conv4(3, width=4).double())
    episodes = image_episodes()
    expected = meta_gradient(forward, theta, episodes, InnerLoop(lr=0.1, steps=1)).grads
    with torch.no_grad():
        grads = meta_gradient(forward, theta, episodes, InnerLoop(lr=0.1, steps=1)).grads
    assert relative_error(grads, expected) == 0


def test_unknown_engine_raises() -> None:
    forward, theta = functionalize(nn.Linear(2, 2))
    x, y = torch.randn(1, 2, 2), torch.zeros(1, 2).long()
    with pytest.raises(ValueError, match=r"engine='nope' is not one of unroll"):
        meta_gradient(forward, theta, Episodes(x, y, x, y), InnerLoop(lr=0.1, steps=1, engine="nope"))
