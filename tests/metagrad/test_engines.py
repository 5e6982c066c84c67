"""Engines against unroll: random numbers, autocast, attention, operations without forward mode."""

from __future__ import annotations

import dataclasses
import logging
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from metalearn import Episodes, InnerLoop, Params, functionalize, meta_gradient
from metalearn.core.params import relative_error
from metalearn.derivatives.hvp import value_and_hvp
from metalearn.metagrad import ENGINES
from metalearn.metagrad.adjoint import _warn_once, adjoint
from metalearn.models import Conv4
from tests.factories import image_episodes
from tests.metagrad.models import MODELS, Lambda
from tests.metagrad.settings import sequences

OTHERS = [engine for engine in ENGINES if engine != "unroll"]


def grads_and_reference(module: nn.Module, episodes: Episodes, engine: str, **settings: Any) -> tuple[Params, Params]:
    """Return the gradients by an engine and by unroll, from the same state of the random generator."""
    forward, theta = functionalize(module)
    inner = InnerLoop(**{"lr": 0.1, "steps": 3, "engine": engine, **settings})
    torch.manual_seed(1)
    got = meta_gradient(forward, theta, episodes, inner).grads
    torch.manual_seed(1)
    plain = dataclasses.replace(inner, engine="unroll", checkpoint_every=1)
    return got, meta_gradient(forward, theta, episodes, plain).grads


@pytest.mark.parametrize("engine", OTHERS)
@pytest.mark.parametrize("every", [1, 2, 3, 4, 5, 7])
def test_gradient_does_not_depend_on_checkpoint_every(every: int, engine: str) -> None:
    module = Conv4(3, width=4).double()
    got, expected = grads_and_reference(module, image_episodes(), engine, steps=5, checkpoint_every=every)
    assert relative_error(got, expected) < 1e-11


@pytest.mark.parametrize("engine", OTHERS)
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("chunk", [None, 1])
def test_recomputation_draws_the_same_dropout_mask(chunk: int | None, every: int, engine: str) -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(40, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 3)).double()
    got, expected = grads_and_reference(
        module, sequences(2, dtype=torch.float64), engine, checkpoint_every=every, task_chunk=chunk
    )
    assert relative_error(got, expected) < 1e-11
    torch.manual_seed(2)
    forward, theta = functionalize(module)
    other = meta_gradient(forward, theta, sequences(2, dtype=torch.float64), InnerLoop(lr=0.1, steps=3)).grads
    assert relative_error(other, expected) > 1e-2, "another seed must give another mask"


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_leave_the_same_rng_state(engine: str) -> None:
    module = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(40, 3)).double()
    forward, theta = functionalize(module)
    draws = []
    for each in ("unroll", engine):
        torch.manual_seed(3)
        inner = InnerLoop(lr=0.1, steps=3, engine=each, checkpoint_every=2)
        meta_gradient(forward, theta, sequences(2, dtype=torch.float64), inner)
        draws.append(torch.rand(4))
    assert torch.equal(*draws)


def attention(qkv: Tensor) -> Tensor:
    q, k, v = qkv.chunk(3, dim=-1)
    return scaled_dot_product_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)).squeeze(1).mean(dim=1)


def attention_by_formula(qkv: Tensor) -> Tensor:
    q, k, v = qkv.chunk(3, dim=-1)
    return ((q @ k.transpose(-1, -2) / 8**0.5).softmax(dim=-1) @ v).mean(dim=1)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("second_order", [True, False])
def test_fused_attention_has_a_second_derivative(second_order: bool, engine: str) -> None:
    layers = nn.Linear(8, 24), nn.Linear(8, 3)
    fused, plain = (
        nn.Sequential(layers[0], Lambda(mix), layers[1]).double() for mix in (attention, attention_by_formula)
    )
    episodes = sequences(2, dtype=torch.float64)
    inner = InnerLoop(lr=0.1, steps=2, engine=engine, second_order=second_order)
    got, expected = (meta_gradient(*functionalize(m), episodes, inner).grads for m in (fused, plain))
    assert relative_error(got, expected) < 1e-10


class SquareWithoutForwardMode(torch.autograd.Function):
    """x^2 with a differentiable backward and no formula for forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        x: Tensor = ctx.saved_tensors[0]
        return 2 * x * grads[0]


def test_adjoint_without_forward_mode_warns_once_and_uses_reverse_over_reverse(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    _warn_once.cache_clear()
    modes: list[str] = []

    def spy(*arguments: Any, mode: str) -> tuple[Tensor, Params]:
        modes.append(mode)
        return value_and_hvp(*arguments, mode=mode)

    monkeypatch.setattr(sys.modules["metalearn.metagrad.adjoint"], "value_and_hvp", spy)
    layers = nn.Flatten(), nn.Linear(40, 8), nn.Dropout(0.3), nn.Linear(8, 3)
    module, plain = (
        nn.Sequential(*layers[:3], Lambda(square), layers[3]).double()
        for square in (SquareWithoutForwardMode.apply, torch.square)
    )
    episodes = sequences(2, dtype=torch.float64)
    inner = InnerLoop(lr=0.1, steps=3, engine="adjoint")
    with caplog.at_level(logging.WARNING):
        torch.manual_seed(1)
        forward, theta = functionalize(module)
        got = meta_gradient(forward, theta, episodes, inner).grads
        meta_gradient(forward, theta, episodes, inner)
    assert modes == ["forward_over_reverse", *6 * ["reverse_over_reverse"]]
    torch.manual_seed(1)
    expected = meta_gradient(*functionalize(plain), episodes, dataclasses.replace(inner, engine="unroll")).grads
    assert relative_error(got, expected) < 1e-11
    assert ["reverse over reverse" in record.message for record in caplog.records] == [True]


def centred_under_no_grad(h: Tensor) -> Tensor:
    with torch.no_grad():
        mean = h.mean(dim=0)
    return torch.tanh(h - mean)


@pytest.mark.parametrize("engine", ENGINES)
def test_no_grad_inside_the_model_stops_the_gradient(engine: str) -> None:
    # Forward mode knows nothing of torch.no_grad(): its tangents would go on through the mean.
    layers = nn.Flatten(), nn.Linear(40, 8), nn.Linear(8, 3)
    module, plain = (
        nn.Sequential(*layers[:2], Lambda(centred), layers[2]).double()
        for centred in (centred_under_no_grad, lambda h: torch.tanh(h - h.mean(dim=0).detach()))
    )
    episodes = sequences(2, dtype=torch.float64)
    inner = InnerLoop(lr=0.5, steps=3, engine=engine)
    got = meta_gradient(*functionalize(module), episodes, inner).grads
    expected = meta_gradient(*functionalize(plain), episodes, dataclasses.replace(inner, engine="unroll")).grads
    assert relative_error(got, expected) < 1e-11
    with torch.no_grad():
        under = meta_gradient(*functionalize(module), episodes, inner).grads
    assert relative_error(under, expected) < 1e-11


@pytest.mark.parametrize("engine", OTHERS)
@pytest.mark.parametrize("model", MODELS)
def test_autocast_to_bfloat16(model: str, engine: str) -> None:
    # bfloat16 keeps 8 bits, an error of 0.4% an operation. How far that spreads depends on the model (BatchNorm over
    # few examples multiplies it); engines must round alike, and none may fall back to first order.
    torch.manual_seed(1)
    forward, theta = functionalize(MODELS[model]())
    episodes = image_episodes(shots=5, queries=5, dtype=torch.float32)
    inner = InnerLoop(lr=0.1, steps=2, engine=engine)
    exact = meta_gradient(forward, theta, episodes, inner).grads
    first = meta_gradient(forward, theta, episodes, dataclasses.replace(inner, second_order=False)).grads
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = meta_gradient(forward, theta, episodes, inner).grads
        reference = meta_gradient(forward, theta, episodes, dataclasses.replace(inner, engine="unroll")).grads
    assert all(g.dtype == torch.float32 for g in rounded.values())
    assert relative_error(rounded, reference) < 0.02
    assert 0 < relative_error(rounded, exact) < relative_error(first, exact)


def test_callback_receives_every_adjoint() -> None:
    # lam_K is the query gradient at theta_K, whose sum over tasks is the first-order meta-gradient; lam_0's is the
    # second-order one.
    forward, theta = functionalize(Conv4(3, width=4).double())
    episodes, inner = image_episodes(), InnerLoop(lr=0.1, steps=3)
    seen: dict[int, Params] = {}
    adjoint(forward, theta, episodes, inner, nn.functional.cross_entropy, callback=lambda k, lam: seen.update({k: lam}))
    assert list(seen) == [3, 2, 1, 0]
    for k, second_order in ((3, False), (0, True)):
        summed = {name: w.sum(dim=0) for name, w in seen[k].items()}
        expected = meta_gradient(forward, theta, episodes, dataclasses.replace(inner, second_order=second_order)).grads
        assert relative_error(summed, expected) < 1e-11
