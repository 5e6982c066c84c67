"""Settings of each kind of benchmark, the cost of an engine, and the check of a configuration. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from metalearn.config.commands_schema import BenchmarkConfig
from metalearn.config.compose import compose, to_dataclass
from metalearn.config.schema import iter_fields
from metalearn.config.validation import validate_train_config
from metalearn.core.errors import ConfigError
from metalearn.core.text import plural

OMNIGLOT_IMAGE = (1, 28, 28)


@dataclass(frozen=True)
class TaskSpec:
    """Tasks and a network; ``name`` is also used in file names.

    Args:
        width: filters of conv4, of ResNet-12's first block, or of the MLP's first layer.
        image: shape of one image; of another than Omniglot's, images are random.
    """

    name: str
    ways: int
    shots: int
    queries: int
    tasks: int
    width: int
    model: Literal["conv4", "conv4 max-pool", "mlp", "resnet12"] = field(default="conv4", kw_only=True)
    image: tuple[int, ...] = field(default=OMNIGLOT_IMAGE, kw_only=True)

    @property
    def title(self) -> str:
        """Description for tables and plots."""
        tasks = describe_tasks(self.ways, self.shots, self.queries, self.tasks)
        return f"{tasks}, {self.model} {self.width} wide"


def describe_tasks(ways: int, shots: int, queries: int, tasks: int) -> str:
    """Return, for example, ``5-way 1-shot, 15 queries, 16 tasks``."""
    return f"{ways}-way {shots}-shot, {plural(queries, 'query', 'queries')}, {plural(tasks, 'task')}"


def pivot(cells: Mapping[tuple[str, Any], str], empty: str = "") -> list[list[str]]:
    """Return a table of cells by the names of their row and column, with a header; its first cell is empty."""
    columns = dict.fromkeys(column for _, column in cells)
    names = dict.fromkeys(name for name, _ in cells)
    rows = [[name, *(cells.get((name, column), empty) for column in columns)] for name in names]
    return [["", *map(str, columns)], *rows]


@dataclass(frozen=True)
class EngineBenchmark(TaskSpec):
    """Tasks, a network, and numbers K of inner steps at which memory and (``timed``) time are measured."""

    steps: tuple[int, ...]
    timed: tuple[int, ...]


ENGINE_SETTINGS = (
    EngineBenchmark("20way_1shot", 20, 1, 1, 16, 64, (1, 5, 10, 20, 50), (1, 10)),
    EngineBenchmark("5way_1shot", 5, 1, 15, 16, 64, (1, 5, 10), (1, 10)),
    EngineBenchmark("5way_5shot", 5, 5, 15, 16, 64, (1, 5, 10), (1, 10)),
    EngineBenchmark("20way_1shot_wide", 20, 1, 1, 4, 256, (1, 10, 50), (10,)),
)


@dataclass(frozen=True)
class EngineCost:
    """Memory and time of one engine at one K.

    Args:
        task_chunk: tasks in a pass; ``None`` is all.
        snapshot_every: ``InnerLoop.checkpoint_every``, under its former name, by which earlier results are read.
        peak_mib: peak memory of one meta-gradient; ``None`` if it exceeded the limit.
        median_ms: median time over rounds; ``None`` if it was not timed.
        ratio_to_unroll: median over rounds of the time divided by that of ``unroll`` on all tasks.
    """

    engine: str
    second_order: bool
    task_chunk: int | None
    snapshot_every: int
    steps: int
    peak_mib: float | None
    median_ms: float | None = None
    quartiles_ms: tuple[float, float] | None = None
    ratio_to_unroll: float | None = None

    @property
    def name(self) -> str:
        """Label in tables and legends."""
        words = [self.engine if self.second_order else "first order"]
        words += [f"{self.task_chunk} task{'s' if self.task_chunk > 1 else ''} at a time"] if self.task_chunk else []
        words += ["sparse checkpoints"] if self.snapshot_every > 1 else []
        return ", ".join(words)


CONFIGURED = "configured"
"""Value of ``bench.setting`` that takes task, inner loop and model from the configuration."""


@dataclass(frozen=True)
class MetaStepSpec(TaskSpec):
    """Tasks, a network, the number K of inner steps, and the inner step size."""

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
    MetaStepSpec("5way_1shot_narrow", 5, 1, 1, 32, 16, steps=1, lr=0.4),
    MetaStepSpec("5way_5shot_max_pool", 5, 5, 15, 4, 64, steps=5, lr=0.1, model="conv4 max-pool"),
    MetaStepSpec("5way_1shot_mlp", 5, 1, 1, 32, 256, steps=1, lr=0.4, model="mlp"),
    MetaStepSpec("5way_1shot_resnet12", 5, 1, 1, 2, 16, steps=1, lr=0.1, model="resnet12", image=(3, 84, 84)),
)
"""Settings of the comparison with other libraries: what is fastest depends on the network.

With max-pooling these are the tasks and steps of functorch's and higher's Omniglot examples, which take 32 tasks: four,
as a round would take minutes. ResNet-12 has a quarter of the usual 64 filters, for the same reason.
"""

FLOAT32_SETTINGS = (
    MetaStepSpec("5way_K1", 5, 1, 1, 1, 64, steps=1, lr=0.4),
    MetaStepSpec("5way_K5", 5, 1, 1, 1, 64, steps=5, lr=0.4),
    MetaStepSpec("20way_K1", 20, 1, 1, 1, 64, steps=1, lr=0.1),
    MetaStepSpec("20way_K5", 20, 1, 1, 1, 64, steps=5, lr=0.1),
)
"""Settings of the comparison of float32 with float64, with one task: among many, one is always near a kink of ReLU."""


@dataclass(frozen=True)
class Sweep:
    """Settings that differ in the field ``name`` of ``MetaStepSpec``."""

    name: str
    axis: str
    base: MetaStepSpec
    values: tuple[int, ...]

    def settings(self) -> list[MetaStepSpec]:
        """Return a setting for each value."""
        changes: list[dict[str, Any]] = [{"name": f"{self.name}={v}", self.name: v} for v in self.values]
        return [replace(self.base, **change) for change in changes]


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

Setting = TypeVar("Setting", TaskSpec, MetaStepSpec, EngineBenchmark, Sweep)


def selected(config: BenchmarkConfig, settings: Iterable[Setting]) -> list[Setting]:
    """Return the settings that ``bench.setting`` names."""
    return [setting for setting in settings if config.bench.setting in ("all", setting.name)]


_UNSUPPORTED = ("run.precision", "run.cuda_graph", "run.deterministic")
_PART_OF_SETTING = ("task.", "inner.", "model.")


def check_benchmark(config: BenchmarkConfig) -> None:
    """Raise ``ConfigError`` for an invalid training or setting, and for keys that would be ignored."""
    kind, setting = config.bench.kind, config.bench.setting
    if setting not in SETTINGS_OF[kind]:
        near = "".join(f" Did you mean {one}?" for one in difflib.get_close_matches(setting, SETTINGS_OF[kind], n=1))
        raise ConfigError(
            f"bench.setting={setting}: there is no such setting.{near} The settings of bench.kind={kind} are "
            f"{', '.join(SETTINGS_OF[kind])}."
        )
    validate_train_config(config)
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
