"""What the benchmark refuses, before anything is loaded."""

from __future__ import annotations

import pytest

from metalearn.commands.benchmark.check import SETTINGS_OF
from metalearn.config.commands_schema import BENCH_SETTINGS
from metalearn.core.errors import ConfigError
from tests.commands.benchmark.factories import config


def test_names_of_the_settings_are_the_schemas() -> None:
    assert {name for names in SETTINGS_OF.values() for name in names} == set(BENCH_SETTINGS)
    assert len(BENCH_SETTINGS) == len(set(BENCH_SETTINGS))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["bench.setting=5way_5shot"], r"bench\.setting=5way_5shot: bench\.kind=peers has all, configured, 5way_1shot"),
        (["bench.kind=sweeps", "bench.setting=configured"], r"bench\.kind=sweeps has all, steps, tasks, ways, width"),
        (["task.ways=4"], r"task\.ways=4: bench\.setting=all has tasks.*bench\.setting=configured"),
        (["bench.kind=engines", "model=mlp"], r"model\.name=mlp.*bench\.setting=configured"),
    ],
)
def test_what_would_not_be_heeded_is_refused(given: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(*given)


def test_the_configured_meta_step_may_be_any() -> None:
    assert config("bench.setting=configured", "task.ways=4", "model=mlp").task.ways == 4
