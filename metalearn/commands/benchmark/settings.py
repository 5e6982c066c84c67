"""Settings of each kind of benchmark, and the check of a benchmark's configuration. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from metalearn.commands.benchmark.engine_settings import ENGINE_SETTINGS, TaskSpec
from metalearn.config.commands_schema import BenchmarkConfig
from metalearn.config.compose import compose, to_dataclass
from metalearn.config.schema import iter_fields
from metalearn.config.validation import validate_train_config
from metalearn.core.errors import ConfigError

CONFIGURED = "configured"
"""Value of ``bench.setting`` that takes task, inner loop and model from the configuration."""


@dataclass(frozen=True)
class MetaStepSpec(TaskSpec):
    """Tasks, a network and an inner loop.

    Args:
        steps: K, the number of inner steps.
        lr: inner step size.
    """

    steps: int
    lr: float

    @property
    def title(self) -> str:
        """Description for tables and plots."""
        return f"{super().title}, K={self.steps}"


LIBRARY_SETTINGS = (
    MetaStepSpec("5way_1shot", 5, 1, 1, 32, 64, steps=1, lr=0.4),
    MetaStepSpec("20way_1shot", 20, 1, 1, 16, 64, steps=5, lr=0.1),
    MetaStepSpec("5way_1shot_15queries", 5, 1, 15, 16, 64, steps=5, lr=0.4),
)
"""Settings of the comparison with other libraries."""

FLOAT32_SETTINGS = (
    MetaStepSpec("5way_K1", 5, 1, 1, 1, 64, steps=1, lr=0.4),
    MetaStepSpec("5way_K5", 5, 1, 1, 1, 64, steps=5, lr=0.4),
    MetaStepSpec("20way_K1", 20, 1, 1, 1, 64, steps=1, lr=0.1),
    MetaStepSpec("20way_K5", 20, 1, 1, 1, 64, steps=5, lr=0.1),
)
"""Settings of the comparison of float32 with float64, with one task: among many, one is always near a kink of ReLU."""


@dataclass(frozen=True)
class Sweep:
    """Settings that differ in one field.

    Args:
        name: the field of ``MetaStepSpec`` that differs; also in file names.
        axis: its label in plots.
        base: values of the other fields.
        values: values of that field.
    """

    name: str
    axis: str
    base: MetaStepSpec
    values: tuple[int, ...]

    def settings(self) -> list[MetaStepSpec]:
        """Return a setting for each value."""
        changes: list[dict[str, int]] = [{self.name: value} for value in self.values]
        names = [f"{self.name}={value}" for value in self.values]
        return [replace(self.base, name=name, **change) for name, change in zip(names, changes, strict=True)]


BASE = MetaStepSpec("base", 5, 1, 1, 8, 64, steps=1, lr=0.4)
SWEEPS = (
    Sweep("steps", "inner steps K", BASE, (1, 2, 5, 10)),
    Sweep("tasks", "tasks T of a meta-step", BASE, (4, 8, 16, 32)),
    Sweep("ways", "ways N", BASE, (5, 10, 20)),
    Sweep("width", "filters of every convolution", BASE, (16, 32, 64, 128)),
)

SETTINGS_OF = {
    "peers": ("all", CONFIGURED, *(setting.name for setting in LIBRARY_SETTINGS)),
    "engines": ("all", *(setting.name for setting in ENGINE_SETTINGS)),
    "float32": ("all", *(setting.name for setting in FLOAT32_SETTINGS)),
    "sweeps": ("all", *(sweep.name for sweep in SWEEPS)),
}
"""Values of ``bench.setting`` for each ``bench.kind``."""

_UNSUPPORTED = ("run.precision", "run.cuda_graph", "run.deterministic")
_PART_OF_SETTING = ("task.", "inner.", "model.")


def check_benchmark(config: BenchmarkConfig) -> None:
    """Check a benchmark's configuration: its training, its setting, and that no key is ignored.

    Raises:
        ConfigError: listing every invalid key.
    """
    validate_train_config(config)
    kind, setting = config.bench.kind, config.bench.setting
    if setting not in SETTINGS_OF[kind]:
        raise ConfigError(f"bench.setting={setting}: bench.kind={kind} has {', '.join(SETTINGS_OF[kind])}")
    default = dict(iter_fields(to_dataclass(compose("benchmark"), BenchmarkConfig)))
    changed = {name: value for name, value in iter_fields(config) if value != default.get(name)}
    if unsupported := [f"{name}={value}" for name, value in changed.items() if name in _UNSUPPORTED]:
        raise ConfigError(
            f"{', '.join(unsupported)}: a benchmark computes in plain float32, without these; leave it out"
        )
    ignored = [f"{name}={value}" for name, value in changed.items() if name.startswith(_PART_OF_SETTING)]
    if ignored and setting != CONFIGURED:
        raise ConfigError(
            f"{', '.join(ignored)}: bench.setting={setting} defines tasks, inner loop and model itself; with "
            f"bench.kind=peers, bench.setting={CONFIGURED} times those of the configuration"
        )
