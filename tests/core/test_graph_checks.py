"""Graphs whose second derivative torch gets wrong: custom Functions and activation checkpointing."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from metalearn import Episodes, InnerLoop, Params, functionalize, meta_gradient
from metalearn.derivatives import hvp

DOUBLE = torch.float64
N = 3
X, THETA = torch.randn(2, 4, 3, dtype=DOUBLE), {"w": torch.randn(3, 2, dtype=DOUBLE)}
TASKS = Episodes(X, torch.zeros(2, 4), X, torch.zeros(2, 4))


def cube_backward(ctx: Any, g: Tensor) -> Tensor:
    return 3 * ctx.saved_tensors[0] ** 2 * g


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    backward = staticmethod(once_differentiable(cube_backward))  # type: ignore[assignment]


class WrappedCube(Cube):
    forward = staticmethod(torch.amp.custom_fwd(Cube.forward, device_type="cpu"))
    backward = staticmethod(torch.amp.custom_bwd(Cube.backward, device_type="cpu"))


class NumpyCube(Cube):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return torch.from_numpy(cube_backward(ctx, g).detach().numpy())


class NoGradCube(Cube):
    backward = staticmethod(torch.no_grad()(cube_backward))


class BatchedCube(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])

    backward = staticmethod(once_differentiable(cube_backward))  # type: ignore[assignment]


@pytest.mark.parametrize("cube", [Cube, BatchedCube, WrappedCube, NumpyCube, NoGradCube])
def test_once_differentiable_function_raises(cube: Any, engine: str) -> None:
    def forward(params: Params, x: Tensor) -> Tensor:
        return cube.apply(x @ params["w"])

    inner = InnerLoop(lr=0.1, steps=1, engine=engine)
    # A loss that is linear in the prediction: what flows back is a constant, and torch raises nothing.
    with pytest.raises(ValueError, match=rf"backward of {cube.__name__}, .*@once_differentiable"):
        meta_gradient(forward, THETA, TASKS, inner, loss=lambda p, y: p.mean())
    first = dataclasses.replace(inner, second_order=False)
    assert meta_gradient(forward, THETA, TASKS, first, loss=lambda p, y: p.mean()).grads["w"].any()
    with pytest.raises(ValueError, match=r"once_differentiable"):
        hvp(lambda w: cube.apply(w).sum(), THETA["w"], THETA["w"], mode="reverse_over_reverse")


class PassedThrough(torch.autograd.Function):
    """The sign, with the gradient of the identity: its backward returns its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


def test_straight_through_function_is_accepted() -> None:
    w, v = torch.randn(4, dtype=DOUBLE), torch.randn(4, dtype=DOUBLE)
    product = hvp(lambda w: PassedThrough.apply(w**2).pow(2).sum(), w, v, mode="reverse_over_reverse")
    # g = 2 sign(w^2) * 2w, and as sign passes its gradient on, dg = (2 * 2w * 2w + 4 sign(w^2)) v.
    torch.testing.assert_close(product, (8 * w**2 + 4) * v)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_activation_checkpointing_inside_model_raises(engine: str, batched: bool, reentrant: bool) -> None:
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, N)

        def forward(self, x: Tensor) -> Tensor:
            h = checkpoint(self.body, x, use_reentrant=reentrant)
            logits: Tensor = self.head(h)
            return logits if batched or logits.sum() > 1e9 else logits * 1  # a branch cannot be batched

    x, y = torch.randn(2, 4, 4), torch.randint(N, (2, 4))
    with pytest.raises(ValueError, match=r"torch\.utils\.checkpoint .*without it; InnerLoop\(engine='checkpoint'\)"):
        meta_gradient(*functionalize(Again()), Episodes(x, y, x, y), InnerLoop(lr=0.1, steps=1, engine=engine))


class Rounded(torch.autograd.Function):
    """A Function whose backward is a constant 0, which has derivative 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.round()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return torch.zeros_like(g)


def test_function_with_zero_gradient_is_accepted() -> None:
    def forward(params: Params, x: Tensor) -> Tensor:
        return x @ params["w"] + Rounded.apply(x @ params["w"])

    assert meta_gradient(forward, THETA, TASKS, InnerLoop(lr=0.1, steps=1), loss=lambda p, y: p.mean()).grads["w"].any()


class Largest(torch.autograd.Function):
    """Values and indices; the gradient of the indices has their shape."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        values, indices = x.max(dim=1)
        ctx.mark_non_differentiable(indices)
        ctx.save_for_backward(indices)
        ctx.width = x.shape[1]
        return values, indices

    @staticmethod
    def backward(ctx: Any, g: Tensor, of_indices: Tensor) -> Tensor:
        (indices,) = ctx.saved_tensors
        assert of_indices.shape == indices.shape
        return functional.one_hot(indices, ctx.width) * g.unsqueeze(1)


def test_function_that_returns_indices_is_accepted() -> None:
    w, v = torch.randn(3, 4, dtype=DOUBLE), torch.randn(3, 4, dtype=DOUBLE)
    product = hvp(lambda w: Largest.apply(w)[0].pow(2).sum(), w, v, mode="reverse_over_reverse")
    torch.testing.assert_close(product, 2 * v * functional.one_hot(w.argmax(dim=1), 4))


def test_saved_tensor_hooks_of_the_caller_are_called() -> None:
    forward, theta = functionalize(nn.Linear(4, N))
    x, y = torch.randn(2, 4, 4), torch.randint(N, (2, 4))
    packed: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        packed.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        meta_gradient(forward, theta, Episodes(x, y, x, y), InnerLoop(lr=0.1, steps=1))
    assert packed
