"""All methods compute the same gradient, or are never timed; and the benchmark's arithmetic of times and FLOPs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from metalearn import Episodes, InnerLoop, MetaGradient
from metalearn.commands.benchmark.measure import compute_results, log_log_slope, step_components, time_breakdown
from metalearn.commands.benchmark.methods import (
    BY_HAND,
    LEARN2LEARN,
    OURS,
    DisagreementError,
    Method,
    build_methods,
    check_gradients_equal,
)
from metalearn.core.params import relative_error
from metalearn.core.profiling.flops import StepFlops, count_flops, meta_gradient_flops, peak_matmul_flops
from metalearn.core.profiling.timing import quartiles, ratios, seconds, time_interleaved
from metalearn.metagrad import ENGINES
from metalearn.metagrad.baselines import by_hand
from metalearn.metagrad.baselines.common import Baseline, installed_peers
from metalearn.models import MLP, Conv4
from tests.commands.benchmark.factories import CPU, tiny_batches, tiny_step
from tests.factories import image_episodes
from tests.metagrad.models import MODELS

INNER = InnerLoop(lr=0.1, steps=2)
HAND: dict[str, Baseline] = {BY_HAND: by_hand.meta_gradient}


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
    cheat = _wrong_in_float32(lambda g: g.mul_(factor), wrong_batches=3)
    with pytest.raises(DisagreementError, match=r"cheat, .* in float32 is at least .* its own float64 gradient"):
        check_gradients_equal([*build_methods(INNER, HAND), cheat], tiny_step().module, tiny_batches())


def test_check_passes_when_two_batches_are_at_a_kink() -> None:
    cheat = _wrong_in_float32(lambda g: g.mul_(1.5), wrong_batches=2)  # of three
    assert (
        check_gradients_equal([*build_methods(INNER, HAND), cheat], tiny_step().module, tiny_batches())["float32"]
        < 1e-4
    )


def _off(library: str, error: float) -> Method:
    """Return a method whose float32 gradient is off by so much."""

    def step(module: nn.Module, episodes: Episodes) -> MetaGradient:
        dtype = episodes.query_x.dtype
        g = torch.ones(1, dtype=dtype) * (1 + error if dtype == torch.float32 else 1)
        return MetaGradient(g[0], {"w": g}, g, g)

    return Method(library, "", True, step)


@pytest.mark.parametrize("factor", [3.0, 5.0])
def test_float32_may_be_four_times_as_far_as_the_hand_written_loop(factor: float) -> None:
    # Where the loop is 1e-2 off in each batch, as among many kinks, 3e-2 is rounding and 5e-2 is not.
    with_error = [_off("x", factor / 100), _off(BY_HAND, 0.01)]
    if factor < 4:
        assert check_gradients_equal(with_error, tiny_step().module, tiny_batches())["float32"] > 1e-2
    else:
        with pytest.raises(DisagreementError, match=r"^x, .* in float32 is at least 5\.0e-02 .* tolerance of 4e-02"):
            check_gradients_equal(with_error, tiny_step().module, tiny_batches())


def test_float32_tolerance_has_a_ceiling() -> None:
    with pytest.raises(DisagreementError, match=r"^x, .* in float32 is at least 1\.0e\+00 .* tolerance of 1e-01"):
        check_gradients_equal([_off("x", -1.0), _off(BY_HAND, 0.09)], tiny_step().module, tiny_batches())


def test_float32_tolerance_is_kept_where_the_hand_written_loop_meets_it() -> None:
    with pytest.raises(DisagreementError, match=r"second order in float32 is at least 2\.0e-04 .* tolerance of 1e-04"):
        check_gradients_equal([_off("x", 2e-4), _off(BY_HAND, 9e-5)], tiny_step().module, tiny_batches())


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


HAND = {BY_HAND: by_hand.meta_gradient}


def test_ratio_is_median_of_ratios_per_round() -> None:
    # Of the medians it would be 2 / 4; in the rounds the ratios are 1/2, 2/4 and 30/10.
    assert ratios([1.0, 2.0, 30.0], [2.0, 4.0, 10.0])[1] == 0.5
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2, 3, 4)


def test_timing_is_interleaved_and_drops_the_warm_up() -> None:
    calls: list[str] = []
    rounds: list[int] = []

    def taken(key: str) -> float:
        calls.append(key)
        return len(calls)

    times = time_interleaved(taken, ["a", "b"], 8, warm_up=1, on_round=rounds.append)
    turns = [calls[i : i + 2] for i in range(0, len(calls), 2)]
    assert all(sorted(turn) == ["a", "b"] for turn in turns), "each once a round"
    assert ["a", "b"] in turns
    assert ["b", "a"] in turns, "rounds have different orders"
    assert times == {key: [i + 1 for i, call in enumerate(calls) if call == key][1:] for key in "ab"}
    assert rounds == list(range(1, 10))
    assert seconds(lambda: None, CPU) >= 0


def test_results_have_speed_rate_and_percent_of_peak() -> None:
    found = [c for c in build_methods(InnerLoop(lr=0.1, steps=1), HAND) if c.engine in ("unroll", "")]
    second, hand, first, hand_first = found
    measured = {second.name: [0.5, 0.25], hand.name: [1.0, 1.0], first.name: [0.2, 0.2], hand_first.name: [0.1, 0.1]}
    peaks = {c.name: 7.0 for c in found}
    rows = compute_results(found, measured, peaks, StepFlops(2, 6), against=BY_HAND, matrix_product_peak=64)
    assert [row.speed for row in rows] == [3, 1, 0.5, 1]  # twice and four times as fast: three times at the median
    assert rows[0].speed_quartiles == (2.5, 3.5)
    assert rows[0].median_ms == 375
    assert rows[0].gflops == pytest.approx(6 / 0.375 / 1e9)
    assert rows[0].percent_of_peak == pytest.approx(25)
    assert rows[2].percent_of_peak == pytest.approx(100 * 2 / 0.2 / 64)
    assert rows[1].peak_mib == 7


def test_time_breakdown_is_differences_of_medians() -> None:
    found = build_methods(InnerLoop(lr=0.1, steps=1), {})
    measured = {c.name: [0.9 if c.second_order else 0.5] * 2 for c in found}
    measured |= {"data": [0.05] * 2, "forward": [0.2] * 2, "optimiser": [0.05] * 2}
    found_shares = time_breakdown(found, measured)["share"]
    expected = {"data": 0.05, "forward": 0.2, "gradient": 0.3, "second-order pass": 0.4, "optimiser": 0.05}
    assert found_shares == pytest.approx(expected)
    assert time_breakdown(found, {**measured, "forward": [0.6, 0.6]})["share"]["gradient"] == 0


def test_step_components_run_and_keep_the_module() -> None:
    step = tiny_step()
    calls: list[tuple[int, int]] = []

    class Sampler:
        def batch(self, index: int, tasks: int) -> None:
            calls.append((index, tasks))

    parts = step_components(step, Sampler(), lr=0.1)  # type: ignore[arg-type]
    before = [p.clone() for p in step.module.parameters()]
    for part in parts.values():
        part()
        part()
    assert calls == [(0, 2), (1, 2)]
    assert all(torch.equal(p, q) for p, q in zip(step.module.parameters(), before, strict=True))


@pytest.mark.parametrize("power", [-1.0, 0.0, 0.5, 2.0])
def test_slope_equals_exponent_of_power_law(power: float) -> None:
    x = [1, 2, 5, 10]
    assert log_log_slope(x, [3 * value**power for value in x]) == pytest.approx(power)


@pytest.mark.parametrize(("x", "y"), [([2, 2], [1, 3]), ([1, 2], [1, 0])])
def test_slope_raises_when_undefined(x: list[float], y: list[float]) -> None:
    with pytest.raises(ValueError, match="two or more different x, and only positive"):
        log_log_slope(x, y)


def counted_and_needed_flops(module: nn.Module, steps: int, *, second_order: bool) -> tuple[int, int]:
    """Return the FLOPs of a hand-written meta-gradient as torch counts them, and those of ``meta_gradient_flops``."""
    episodes = image_episodes(dtype=torch.float32)
    inner = InnerLoop(lr=0.1, steps=steps, second_order=second_order)
    needed = meta_gradient_flops(module, episodes, steps)
    counted = count_flops(partial(by_hand.meta_gradient, module, episodes, inner))
    return counted, needed.second_order if second_order else needed.first_order


@pytest.mark.parametrize("steps", [1, 3])
def test_mlp_flops_equal_those_of_a_hand_written_loop(steps: int) -> None:
    for second_order in (True, False):
        counted, needed = counted_and_needed_flops(MLP(28 * 28, 3, hidden=[16, 16]), steps, second_order=second_order)
        assert counted == needed


@pytest.mark.parametrize("steps", [1, 3])
def test_autograd_computes_one_unneeded_product_for_convolutions(steps: int) -> None:
    module = Conv4(3, width=4, pool="max")
    counted, needed = counted_and_needed_flops(module, steps, second_order=True)
    # In every support step it forms the images' gradient, which nobody asks for: one product of the first layer,
    # 3 tasks of 3 images of 28 x 28 positions, 4 filters of 3 x 3.
    assert counted - needed == steps * 2 * 3 * 3 * (28 * 28) * 4 * 9
    counted, needed = counted_and_needed_flops(module, steps, second_order=False)
    assert counted == needed


def test_strided_convolutions_need_at_most_10_percent_more() -> None:
    counted, needed = counted_and_needed_flops(Conv4(3, width=16), 2, second_order=True)
    assert needed < counted < 1.1 * needed  # windows that stand over the edge are computed, and thrown away


def test_peak_matmul_flops_is_positive() -> None:
    assert peak_matmul_flops(CPU, size=64) > 0
