"""Interleave timings of alternatives, so that a busy machine slows all of them alike."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)


def seconds(step: Callable[[], object], device: torch.device) -> float:
    """Return the wall time of one call, including the device's work."""
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
    """Return ``rounds`` times of each key, each timed once per round, after ``warm_up`` rounds that do not count.

    Each round has an order of its own, as what ran before may leave threads that still wait. ``seconds_of`` runs one
    alternative once; ``on_round`` is called with the number of rounds done, warm-up included.
    """
    times: dict[Key, list[float]] = {key: [] for key in keys}
    shuffled = random.Random(0)
    for turn in range(warm_up + rounds):
        for key in shuffled.sample(keys, len(keys)):
            taken = seconds_of(key)
            if turn >= warm_up:
                times[key].append(taken)
        on_round(turn + 1)
    return times


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the lower quartile, median and upper quartile of at least two values."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, float, float]:
    """Return the quartiles of ratios of times taken in the same round."""
    return quartiles([a / b for a, b in zip(numerators, denominators, strict=True)])
