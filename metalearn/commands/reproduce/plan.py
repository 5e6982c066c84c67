"""What a reproduction consists of: a row is an experiment in one order, and has a run for each seed. Needs no torch."""

from __future__ import annotations

import dataclasses
import difflib
import shlex
from dataclasses import dataclass
from pathlib import Path

from metalearn.commands.compare.variants import Job, format_override
from metalearn.config.commands_schema import ReproduceConfig
from metalearn.config.compose import compose, options, to_dataclass
from metalearn.config.run_config import resolve_data, resolve_resume
from metalearn.config.schema import OmniglotConfig, TrainConfig
from metalearn.config.validation import validate_train_config
from metalearn.core.errors import ConfigError, RunError

LEAST_TEST_TASKS = 600
"""Over which an accuracy must be a mean to be recorded."""

_NOT_AN_OVERRIDE = {
    "experiment": "experiment_name= names the experiment",
    "inner.second_order": "orders= says which orders",
    "run.seed": "seeds= says which seeds",
    "run.resume": "a reproduction goes on by itself",
    "run.init_from": "a row's runs start from random parameters",
    "data.fallback": "a published row is never taken on other data unasked; data=glyphs asks for it",
    "hydra": "folders are named by row, order and seed, below hydra.run.dir",
}
_SAME_FIGURES = (
    *("run.device", "run.checkpoint_every_s", "run.on_nonfinite", "run.deterministic", "run.memory_limit_mib"),
    *("run.cuda_graph", "inner.engine", "inner.task_chunk", "inner.checkpoint_every", "data.root", "log."),
)
"""Beginnings of keys that may be overridden in a row that is recorded: they change how it is computed, not what."""


@dataclass(frozen=True)
class TableRow:
    """A line of the table.

    Args:
        experiment: a file in ``conf/experiment/``.
        order: ``second`` or ``first``.
        overrides: as they were given, but for where the data lies.
        jobs: a run for every seed.
    """

    experiment: str
    order: str
    overrides: list[str]
    jobs: list[Job]

    @property
    def seeds(self) -> list[int]:
        """In the order in which they are trained."""
        return [job.config.run.seed for job in self.jobs]

    @property
    def command(self) -> str:
        """What reproduces it."""
        more = [f"overrides={format_override(self.overrides)}"] if self.overrides else []
        seeds = ",".join(map(str, self.seeds))
        asked = [f"experiment_name={self.experiment}", f"orders=[{self.order}]", f"seeds=[{seeds}]", *more]
        return shlex.join(["python", "scripts/reproduce.py", *asked])


def check_reproduce(config: ReproduceConfig) -> None:
    """Refuse what cannot be trained, or may not be recorded, before anything is loaded.

    Raises:
        ConfigError: naming the key, the value and what to do.
    """
    known = options("experiment")
    if config.experiment_name not in known:
        near = "".join(
            f"Did you mean {name}? " for name in difflib.get_close_matches(config.experiment_name, known, n=1)
        )
        raise ConfigError(
            f"experiment_name={config.experiment_name}: there is no such experiment. {near}The rows are "
            f"{', '.join(known)}; a file in conf/experiment/ adds one"
        )
    for name, values in (
        ("orders", [str(order) for order in config.orders]),
        ("seeds", [str(seed) for seed in config.seeds]),
    ):
        if twice := [value for value in values if values.count(value) > 1]:
            raise ConfigError(f"{name}=[{','.join(values)}]: {twice[0]} stands there twice; leave one out")
    for override in config.overrides:
        key = _key(override)
        for name, reason in _NOT_AN_OVERRIDE.items():
            if key == name or key.startswith((f"{name}.", f"{name}/")):
                raise ConfigError(f"overrides, {override!r}: {reason}; leave it out")
    for row in build_rows(config, Path()):
        training = row.jobs[0].config
        try:
            validate_train_config(_without_fallback(training))
        except ConfigError as error:
            raise ConfigError(f"experiment_name={config.experiment_name}: {error}") from error
        if config.update_reference:
            _refuse_to_record(config, training)


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _without_fallback(config: TrainConfig) -> TrainConfig:
    """The same, but without leave to take other data where Omniglot is missing."""
    if not isinstance(config.data, OmniglotConfig):
        return config
    return dataclasses.replace(config, data=dataclasses.replace(config.data, fallback=None))


def _refuse_to_record(config: ReproduceConfig, training: TrainConfig) -> None:
    if other := [o for o in config.overrides if not _key(o).startswith(_SAME_FIGURES)]:
        raise ConfigError(
            f"update_reference=true with overrides={other}: this is another setting than {config.experiment_name}, and "
            "would be recorded under its name; put it into a file of its own in conf/experiment/, and name that one"
        )
    if training.data.name != "omniglot":
        raise ConfigError(
            f"update_reference=true with data={training.data.name}: the table holds figures on Omniglot alone"
        )
    if training.eval.episodes < LEAST_TEST_TASKS:
        raise ConfigError(
            f"update_reference=true with eval.episodes={training.eval.episodes}: a recorded row is tested on at least "
            f"{LEAST_TEST_TASKS} tasks"
        )


def build_rows(config: ReproduceConfig, folder: Path) -> list[TableRow]:
    """The rows, in the order of ``orders``.

    Args:
        config: its row is known.
        folder: of all reproductions; a run's is ``ROW/second_order-seed0`` below it.

    Raises:
        ConfigError: if a training cannot be composed.
    """
    rows = []
    for order in config.orders:
        name = f"{order}_order"
        asked = [f"experiment={config.experiment_name}", f"inner.second_order={format_override(order == 'second')}"]
        training = to_dataclass(compose("train", [*asked, *config.overrides]), TrainConfig)
        jobs = [
            Job(
                name,
                folder / config.experiment_name / f"{name}-seed{seed}",
                dataclasses.replace(training, run=dataclasses.replace(training.run, seed=seed)),
            )
            for seed in config.seeds
        ]
        said = [override for override in config.overrides if _key(override) != "data.root"]
        rows.append(TableRow(config.experiment_name, order, said, jobs))
    return rows


def resolve_row(row: TableRow) -> TableRow:
    """The row with the data set where it lies, and the engine of runs that go on.

    Raises:
        RunError: if a folder holds a run with another configuration.
    """
    data = resolve_data(row.jobs[0].config).data
    jobs = []
    for job in row.jobs:
        training = dataclasses.replace(job.config, data=data, run=dataclasses.replace(job.config.run, resume="auto"))
        try:
            jobs.append(dataclasses.replace(job, config=resolve_resume(training, job.folder)))
        except RunError as error:
            raise RunError(_without_advice(str(error))) from error
    return dataclasses.replace(row, jobs=jobs)


def _without_advice(message: str) -> str:
    """A training may accept other values; a row has one configuration."""
    before, found, _ = message.partition("\nResume with the same values")
    return (
        f"{before}\nResume with the same values, or choose another folder with hydra.run.dir=PATH." if found else before
    )
