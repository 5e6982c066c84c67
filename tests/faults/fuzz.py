"""A thousand random calls, configurations and damaged folders: a right answer, or one of our errors.

Hypothesis draws them, so that a failure comes with the smallest case that shows it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.faults import fuzz_calls, fuzz_configs, fuzz_episodes, fuzz_images, fuzz_texts
from tests.faults.suite import Attempt, Row

Case = TypeVar("Case")


def attempt(cases: st.SearchStrategy[Case], hold: Callable[[Case, Path, Path], None], *, n: int) -> Attempt:
    """Draw n cases, other ones for every number of the attempt, and hold each in ``(case, folder, shared)``."""

    def drawn(i: int, folder: Path, shared: Path) -> None:
        @seed(i)
        @settings(
            max_examples=n,
            database=None,
            deadline=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(cases)
        def every(case: Case) -> None:
            hold(case, folder, shared)

        every()

    return drawn


FUZZED = [
    Row(
        name="fuzzed_episodes",
        fault="tensors, parameters and settings at random, by way of `Episodes`, `adapt`, `predict`, `meta_gradient`",
        must_hold="the answer of one task after the other, or an error of ours that names what was wrong",
        tries=10,
        attempt=attempt(fuzz_calls.cases(), lambda case, folder, shared: fuzz_episodes.hold(case), n=50),
        short=(0, 1),
        cases=50,
        seconds=0.5,
    ),
    Row(
        name="fuzzed_configurations",
        fault="overrides and experiment files at random",
        must_hold="what was asked for, of the right types, or a `ConfigError` that names the key or the file",
        tries=15,
        attempt=attempt(fuzz_texts.cases(), lambda case, folder, shared: fuzz_configs.hold(case, folder), n=20),
        short=(0,),
        cases=20,
        seconds=1.5,
    ),
    Row(
        name="fuzzed_images",
        fault="a folder of images with up to three damages at random: in files, links, names and folders",
        must_hold="the same images, or a `DataError` that names the folder",
        tries=10,
        attempt=attempt(fuzz_images.cases(), fuzz_images.hold, n=20),
        short=(0,),
        cases=20,
        seconds=1,
    ),
]
