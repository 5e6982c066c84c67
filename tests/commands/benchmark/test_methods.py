"""All methods compute the same gradient; a method that does not is never timed."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from metalearn import Episodes, InnerLoop, MetaGradient
from metalearn.commands.benchmark.methods import (
    BY_HAND,
    LEARN2LEARN,
    OURS,
    DisagreementError,
    Method,
    build_methods,
    check_gradients_equal,
)
from metalearn.core.functional import relative_error
from metalearn.metagrad import ENGINES
from metalearn.metagrad.baselines import by_hand
from metalearn.metagrad.baselines.common import Peer, installed_peers
from tests.commands.benchmark.factories import tiny_batches, tiny_step
from tests.factories import image_episodes
from tests.metagrad.models import MODELS

INNER = InnerLoop(lr=0.1, steps=2)
HAND: dict[str, Peer] = {BY_HAND: by_hand.meta_gradient}


def test_methods_are_engines_and_peers_in_both_orders() -> None:
    found = build_methods(INNER, {**HAND, LEARN2LEARN: by_hand.meta_gradient})
    second = [(OURS, engine, True) for engine in ENGINES] + [(BY_HAND, "", True), (LEARN2LEARN, "", True)]
    first = [(OURS, "unroll", False), (BY_HAND, "", False), (LEARN2LEARN, "", False)]
    assert [(c.library, c.engine, c.second_order) for c in found] == second + first


def test_methods_agree() -> None:
    peers, _ = installed_peers()
    step = tiny_step()
    differences = check_gradients_equal(build_methods(step.inner, {**HAND, **peers}), step.module, tiny_batches())
    assert differences["float64"] < 1e-9
    assert 0 < differences["float32"] < 1e-4  # 0 would mean that float32 was not compared


@pytest.mark.parametrize("second_order", [True, False])
def test_check_raises_when_a_gradient_is_wrong(second_order: bool) -> None:
    step = tiny_step()
    found = build_methods(step.inner, HAND)
    other = next(c for c in found if c.second_order != second_order)
    cheat = Method("cheat", "fast", second_order, other.step)
    order = "second order" if second_order else "first order"
    with pytest.raises(
        DisagreementError, match=rf"cheat fast, {order} differs from metalearn unroll, {order} by .* in float64"
    ):
        check_gradients_equal([*found, cheat], step.module, tiny_batches())


def _wrong_in_float32(corrupt: Callable[[Tensor], object], wrong_batches: int) -> Method:
    """Return a method that is wrong in float32 on the first batches only."""
    correct, calls = build_methods(INNER, HAND)[0], itertools.count()

    def step(module: nn.Module, episodes: Episodes) -> MetaGradient:
        result = correct.step(module, episodes)
        if episodes.query_x.dtype == torch.float32 and next(calls) < wrong_batches:
            corrupt(next(iter(result.grads.values())))
        return result

    return Method("cheat", "", True, step)


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_check_raises_when_only_float32_is_wrong(factor: float) -> None:
    cheat = _wrong_in_float32(lambda g: g.mul_(factor), wrong_batches=2)
    with pytest.raises(DisagreementError, match=r"cheat, second order in float32 is .* its own float64 gradient"):
        check_gradients_equal([*build_methods(INNER, HAND), cheat], tiny_step().module, tiny_batches())


def test_check_passes_when_one_batch_is_at_a_kink() -> None:
    cheat = _wrong_in_float32(lambda g: g.mul_(1.5), wrong_batches=1)  # of three
    assert (
        check_gradients_equal([*build_methods(INNER, HAND), cheat], tiny_step().module, tiny_batches())["float32"]
        < 1e-4
    )


def test_check_raises_when_float64_is_nan() -> None:
    def nan_step(module: nn.Module, episodes: Episodes) -> MetaGradient:
        result = build_methods(INNER, HAND)[0].step(module, episodes)
        next(iter(result.grads.values())).fill_(float("nan"))
        return result

    with pytest.raises(DisagreementError, match=r"cheat, second order differs from .* by inf in float64"):
        check_gradients_equal(
            [*build_methods(INNER, HAND), Method("cheat", "", True, nan_step)], tiny_step().module, tiny_batches()
        )


@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("steps", [0, 2])
def test_hand_written_loop_equals_engines_and_keeps_the_module(second_order: bool, steps: int) -> None:
    module = MODELS["mlp"]().double()
    frozen = next(iter(module.parameters())).requires_grad_(False)
    episodes = image_episodes()
    inner = InnerLoop(lr=0.1, steps=steps, second_order=second_order)
    ours, theirs = (c.step(module, episodes) for c in build_methods(inner, HAND, orders=[second_order])[-2:])
    assert ours.grads.keys() == theirs.grads.keys()
    assert relative_error(theirs.grads, ours.grads) < 1e-12
    assert all(p.grad is None for p in module.parameters())
    assert not frozen.requires_grad
    assert theirs.predictions.shape == (3, 6, 3)
    assert theirs.support_loss.shape == (steps,)
