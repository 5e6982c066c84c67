"""The published table, and the runs of a row: an experiment in one order, with a run for each seed. Needs no torch."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from metalearn.commands.compare.variants import Job, replace_in, replace_section
from metalearn.config.commands_schema import ReproduceConfig
from metalearn.config.compose import compose, options, to_dataclass, user_conf_dir
from metalearn.config.options import OmniglotConfig
from metalearn.config.run_config import resolve_data, resolve_resume
from metalearn.config.schema import TrainConfig
from metalearn.config.validation import validate_train_config
from metalearn.core.errors import ConfigError, RunError
from metalearn.core.quoting import format_override, quote_command

SETTINGS = ((5, 1), (5, 5), (20, 1), (20, 5))
"""Ways and shots of the published table."""

PUBLISHED = {
    ("maml", "second"): ("Finn et al. 2017", (0.987, 0.999, 0.958, 0.989)),
    ("maml", "first"): ("Nichol et al. 2018", (0.983, 0.992, 0.894, 0.979)),
    ("meta_sgd", "second"): ("Li et al. 2017", (0.9953, 0.9993, 0.9593, 0.9897)),
    ("maml_pp", "second"): ("Antoniou et al. 2019", (0.9947, 0.9993, 0.9765, 0.9933)),
    ("meta_curvature", "second"): ("Park & Oliva 2019, MC2+", (0.9997, 0.9989, 0.9912, 0.9965)),
}
"""Accuracies on Omniglot by algorithm and order, in the order of ``SETTINGS``; Finn et al. report no first order."""

MIN_TEST_TASKS = 600
"""Number of test tasks that a recorded accuracy needs at least."""

_RESERVED_KEYS = {
    "experiment": "experiment_name= names the experiment",
    "inner.second_order": "orders= lists the orders",
    "run.seed": "seeds= lists the seeds",
    "run.resume": "a reproduction resumes by itself",
    "run.init_from": "a row's runs start from random parameters",
    "data.fallback": "a published row never falls back to other data; data=glyphs asks for it",
    "hydra": "folders are named by row, order and seed, below hydra.run.dir",
}
"""Keys that ``overrides=`` may not set, and why."""
_HARMLESS_KEYS = (
    *("run.device", "run.checkpoint_every_s", "run.on_nonfinite", "run.deterministic", "run.memory_limit_mib"),
    *("run.cuda_graph", "inner.engine", "inner.task_chunk", "inner.checkpoint_every", "data.root", "log."),
)
"""Beginnings of keys that a recorded row may override: they change how it is computed, and not its definition."""


class Published(NamedTuple):
    """A published accuracy, a fraction, and its source."""

    accuracy: float
    source: str

    def __str__(self) -> str:
        return f"{round(100 * self.accuracy, 2):g}% ({self.source})"


def published(algorithm: str, order: str, ways: int, shots: int) -> Published | None:
    """Return the published accuracy; ``None`` where there is none.

    Examples:
        >>> str(published("maml", "second", 5, 1))
        '98.7% (Finn et al. 2017)'
    """
    if (algorithm, order) not in PUBLISHED or (ways, shots) not in SETTINGS:
        return None
    source, accuracies = PUBLISHED[algorithm, order]
    return Published(accuracies[SETTINGS.index((ways, shots))], source)


@dataclass(frozen=True)
class TableRow:
    """A row of the table: an experiment in one order, with a job for every seed.

    Args:
        experiment: a file in ``conf/experiment/``.
        overrides: as the user wrote them, without the location of the data.
    """

    experiment: str
    order: str
    overrides: list[str]
    jobs: list[Job]

    @property
    def seeds(self) -> list[int]:
        """Seeds in the order in which they are trained."""
        return [job.config.run.seed for job in self.jobs]

    @property
    def command(self) -> str:
        """Command line that reproduces the row."""
        overrides = [f"overrides={format_override(self.overrides)}"] if self.overrides else []
        seeds = ",".join(map(str, self.seeds))
        arguments = [f"experiment_name={self.experiment}", f"orders=[{self.order}]", f"seeds=[{seeds}]", *overrides]
        return quote_command(["python", "scripts/reproduce.py", *arguments])


def check_reproduce(config: ReproduceConfig) -> None:
    """Raise ``ConfigError`` before anything is loaded if the row cannot be trained, or recorded as requested."""
    experiments = options("experiment", user_conf_dir())
    if config.experiment_name not in experiments:
        similar = difflib.get_close_matches(config.experiment_name, experiments, n=1)
        hint = "".join(f"Did you mean {name}? " for name in similar)
        raise ConfigError(
            f"experiment_name={config.experiment_name}: there is no such experiment. {hint}The rows are "
            f"{', '.join(experiments)}; a file in conf/experiment/ adds one"
        )
    for name, values in (("orders", list[str](config.orders)), ("seeds", [str(seed) for seed in config.seeds])):
        if repeated := [value for value in values if values.count(value) > 1]:
            raise ConfigError(f"{name}=[{','.join(values)}]: {repeated[0]} is listed twice; leave one out")
    for override in config.overrides:
        for name, reason in _RESERVED_KEYS.items():
            if _key(override) == name or _key(override).startswith((f"{name}.", f"{name}/")):
                raise ConfigError(f"overrides, {override!r}: {reason}; leave it out")
    try:
        rows = build_rows(config, Path())
    except ConfigError as error:
        raise ConfigError(f"experiment_name={config.experiment_name}: {error}") from error
    for row in rows:
        training = row.jobs[0].config
        try:  # Omniglot must be there: a published row is never trained on the fallback
            omniglot = isinstance(training.data, OmniglotConfig)
            validate_train_config(replace_in(training, "data", fallback=None) if omniglot else training)
        except ConfigError as error:
            raise ConfigError(f"experiment_name={config.experiment_name}: {error}") from error
        if config.update_reference:
            _check_recordable(config, training)


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _check_recordable(config: ReproduceConfig, training: TrainConfig) -> None:
    if other := [override for override in config.overrides if not _key(override).startswith(_HARMLESS_KEYS)]:
        raise ConfigError(
            f"update_reference=true with overrides={other}: this is not the setting of {config.experiment_name}, and "
            "would be recorded under its name; put it into a file of its own in conf/experiment/, and give its "
            "experiment_name="
        )
    if training.data.name != "omniglot":
        raise ConfigError(f"update_reference=true with data={training.data.name}: the table is about Omniglot only")
    if training.eval.episodes < MIN_TEST_TASKS:
        raise ConfigError(
            f"update_reference=true with eval.episodes={training.eval.episodes}: a recorded row is tested on at least "
            f"{MIN_TEST_TASKS} tasks"
        )


def build_rows(config: ReproduceConfig, folder: Path) -> list[TableRow]:
    """Return the rows of all orders, or raise ``ConfigError``; a run's folder is ``ROW/second_order-seed0``."""
    overrides = [override for override in config.overrides if _key(override) != "data.root"]
    rows = []
    for order in config.orders:
        name = f"{order}_order"
        choice = [f"experiment={config.experiment_name}", f"inner.second_order={format_override(order == 'second')}"]
        training = to_dataclass(compose("train", [*choice, *config.overrides]), TrainConfig)
        jobs = [
            Job(name, folder / config.experiment_name / f"{name}-seed{seed}", replace_in(training, "run", seed=seed))
            for seed in config.seeds
        ]
        rows.append(TableRow(config.experiment_name, order, overrides, jobs))
    return rows


def resolve_row(row: TableRow) -> TableRow:
    """Return the row with the location of the data, and the engine of runs that are resumed."""
    data = resolve_data(row.jobs[0].config).data
    jobs = []
    for job in row.jobs:
        training = replace_in(replace_section(job.config, "data", data), "run", resume="auto")
        try:
            jobs.append(dataclasses.replace(job, config=resolve_resume(training, job.folder)))
        except RunError as error:
            raise RunError(_without_advice(str(error))) from error
    return dataclasses.replace(row, jobs=jobs)


def _without_advice(message: str) -> str:
    """Remove the advice to accept other values, as a row has one configuration."""
    before, found, _ = message.partition("\nResume with the same values")
    return f"{before}\nUse the same values, or another folder with hydra.run.dir=PATH." if found else before
