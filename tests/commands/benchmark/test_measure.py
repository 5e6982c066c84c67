"""The benchmark's arithmetic: ratios, rates, time breakdown, slopes, interleaved timing, and FLOPs of a meta-step."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from metalearn import InnerLoop
from metalearn.commands.benchmark.measure import compute_results, log_log_slope, step_components, time_breakdown
from metalearn.commands.benchmark.methods import BY_HAND, build_methods
from metalearn.core.profiling.flops import StepFlops, count_flops, meta_gradient_flops, peak_matmul_flops
from metalearn.core.profiling.timing import quartiles, ratios, seconds, time_interleaved
from metalearn.metagrad.baselines import by_hand
from metalearn.models import MLP, Conv4
from tests.commands.benchmark.factories import CPU, tiny_step
from tests.factories import image_episodes

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

    assert time_interleaved(taken, ["a", "b"], 2, warm_up=1, on_round=rounds.append) == {"a": [3, 5], "b": [4, 6]}
    assert calls == ["a", "b"] * 3
    assert rounds == [1, 2, 3]
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
