"""The check of a benchmark's configuration."""

from __future__ import annotations

import pytest

from metalearn.commands.benchmark.settings import SETTINGS_OF
from metalearn.config.commands_schema import BENCH_SETTINGS
from metalearn.core.errors import ConfigError
from tests.commands.benchmark.factories import config


def test_setting_names_equal_those_of_the_schema() -> None:
    assert {name for names in SETTINGS_OF.values() for name in names} == set(BENCH_SETTINGS)
    assert len(BENCH_SETTINGS) == len(set(BENCH_SETTINGS))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["bench.setting=5way_5shot"], r"bench\.setting=5way_5shot: bench\.kind=peers has all, configured, 5way_1shot"),
        (["bench.kind=sweeps", "bench.setting=configured"], r"bench\.kind=sweeps has all, steps, tasks, ways, width"),
        (["task.ways=4"], r"task\.ways=4: bench\.setting=all defines tasks.*bench\.setting=configured"),
        (["bench.kind=engines", "model=mlp"], r"model\.name=mlp.*bench\.setting=configured"),
    ],
)
def test_config_raises_when_a_key_would_be_ignored(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(*overrides)


def test_configured_setting_accepts_task_and_model() -> None:
    assert config("bench.setting=configured", "task.ways=4", "model=mlp").task.ways == 4
