"""Timing by turns: what is compared takes turns, so that a machine whose speed drifts treats all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)


def seconds(step: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, until the device has finished it."""
    _wait_for(device)
    started = time.perf_counter()
    step()
    _wait_for(device)
    return time.perf_counter() - started


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_interleaved(
    seconds_of: Callable[[Key], float],
    keys: Sequence[Key],
    rounds: int,
    *,
    warm_up: int = 1,
    on_round: Callable[[int], object] = lambda done: None,
) -> dict[Key, list[float]]:
    """Seconds of each in each round.

    Args:
        seconds_of: runs one of them once, and says how long it took.
        keys: what takes turns, in this order.
        rounds: times that each is timed.
        warm_up: rounds before those, whose times are thrown away.
        on_round: is told how many rounds are done, those to warm up included.

    Returns:
        A list of ``rounds`` times for every key.
    """
    times: dict[Key, list[float]] = {key: [] for key in keys}
    for turn in range(warm_up + rounds):
        for key in keys:
            taken = seconds_of(key)
            if turn >= warm_up:
                times[key].append(taken)
        on_round(turn + 1)
    return times


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of at least two values."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, float, float]:
    """Quartiles of the ratios of times that were taken in the same round; the middle one is their median."""
    return quartiles([a / b for a, b in zip(numerators, denominators, strict=True)])
