"""Refusing a benchmark that would not measure what was asked for. Imports neither torch nor Hydra."""

from __future__ import annotations

from metalearn.commands.benchmark.engine_settings import SETTINGS as ENGINE_SETTINGS
from metalearn.commands.benchmark.settings import FLOAT32_SETTINGS, SETTINGS, SWEEPS
from metalearn.config.commands_schema import BenchmarkConfig
from metalearn.config.compose import compose, to_dataclass
from metalearn.config.schema import iter_fields
from metalearn.config.validation import validate_train_config
from metalearn.core.errors import ConfigError

CONFIGURED = "configured"
"""The value of ``bench.setting`` that takes task, inner loop and model from the configuration."""

SETTINGS_OF = {
    "peers": ("all", CONFIGURED, *(setting.name for setting in SETTINGS)),
    "engines": ("all", *(setting.name for setting in ENGINE_SETTINGS)),
    "float32": ("all", *(setting.name for setting in FLOAT32_SETTINGS)),
    "sweeps": ("all", *(sweep.name for sweep in SWEEPS)),
}
"""Values of ``bench.setting`` for each ``bench.kind``."""

_NEVER = ("run.precision", "run.cuda_graph", "run.deterministic")
_OF_A_SETTING = ("task.", "inner.", "model.")


def check_benchmark(config: BenchmarkConfig) -> None:
    """Validate a benchmark's configuration: its training, its setting, and no key that it would not heed.

    Raises:
        ConfigError: listing every fault.
    """
    validate_train_config(config)
    kind, setting = config.bench.kind, config.bench.setting
    if setting not in SETTINGS_OF[kind]:
        raise ConfigError(f"bench.setting={setting}: bench.kind={kind} has {', '.join(SETTINGS_OF[kind])}")
    default = dict(iter_fields(to_dataclass(compose("benchmark"), BenchmarkConfig)))
    unheeded = [
        f"{name}={value}"
        for name, value in iter_fields(config)
        if name.startswith(_OF_A_SETTING) and value != default.get(name)
    ]
    never = [f"{name}={value}" for name, value in iter_fields(config) if name in _NEVER and value != default[name]]
    if never:
        raise ConfigError(f"{', '.join(never)}: a benchmark is of float32, computed step by step; leave it out")
    if setting == CONFIGURED:
        return
    if unheeded:
        raise ConfigError(
            f"{', '.join(unheeded)}: bench.setting={setting} has tasks, inner loop and model of its own; with "
            f"bench.kind=peers, bench.setting={CONFIGURED} times the configuration's"
        )
