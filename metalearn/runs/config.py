"""From the command line to a checked configuration: the only place that knows Hydra.

    @main("train", TrainConfig, check)
    def train(config: TrainConfig, run_dir: Path) -> None: ...

composes ``conf/train.yaml`` with the command line, refuses what cannot be run before torch is imported, and calls the
function once, or once a job under ``--multirun``.
"""

from __future__ import annotations

import functools
import itertools
import logging
import re
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import hydra
from hydra._internal.utils import get_args_parser  # Hydra's own parser: no public way to read its flags
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from metalearn.data.catalog import dataset_in_use
from metalearn.errors import ConfigError, FolderTakenError, MetalearnError
from metalearn.runs import schema, schema_commands
from metalearn.runs.compare.names import RECORD, comparison_folder
from metalearn.runs.config_help import GROUPS, explain, help_text, unknown_keys

RUN_FILES = (
    "config.yaml",
    "metrics.json",
    "checkpoints",
    "benchmark.json",
    "lessons.json",
    "verify.json",
    RECORD,
)
"""By these a folder is known to hold a run; nothing is written there again."""

CONF = Path(__file__).parents[2] / "conf"
log = logging.getLogger(__name__)

Config = TypeVar("Config")

SCHEMAS: dict[str, type] = {
    "train": schema.TrainConfig,
    "benchmark": schema_commands.BenchmarkConfig,
    "compare": schema_commands.CompareConfig,
    "evaluate": schema_commands.EvaluateConfig,
    "gradients": schema_commands.GradientsConfig,
    "verify": schema_commands.VerifyConfig,
    "maml": schema.AlgorithmConfig,
    "omniglot": schema.OmniglotConfig,
    "glyphs": schema.GlyphsConfig,
    "conv4": schema.Conv4Config,
    "mlp": schema.MLPConfig,
}


def main(
    name: str,
    kind: type[Config],
    check: Callable[[Config], None],
    *,
    may_continue: Callable[[Config], bool] = lambda config: False,
) -> Callable[[Callable[[Config, Path], None]], Callable[[], None]]:
    """Make a function of a configuration and an output folder into a command.

    Args:
        name: of the primary file in ``conf/``.
        kind: its schema.
        check: raises ``ConfigError`` for a configuration that cannot be run.
        may_continue: whether a folder that holds a run already is no fault; the function looks into it then.
    """

    def decorate(function: Callable[[Config, Path], None]) -> Callable[[], None]:
        @functools.wraps(function)
        def command() -> None:
            flags = get_args_parser().parse_args()
            try:
                if flags.help:
                    config = compose(name)
                    print(help_text(config, sys.argv[0], function.__doc__ or "", option_sections(name, config)))
                    return
                if not (flags.hydra_help or flags.info or flags.shell_completion):
                    for overrides in jobs(flags.overrides) if flags.multirun else [flags.overrides]:
                        check(typed(compose(flags.config_name or name, overrides, flags.config_dir), kind))
                        _refuse_file_as_folder(overrides)
            except MetalearnError as error:
                _stop(error)
            hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(job)()

        def job(config: DictConfig) -> None:
            output_dir = Path(HydraConfig.get().runtime.output_dir)
            try:
                checked = typed(config, kind)
                check(checked)
                if not may_continue(checked):
                    refuse_taken(output_dir)
                function(checked, output_dir)
            except MetalearnError as error:
                _stop(error)
            except KeyboardInterrupt:
                print(f"Interrupted. What was written so far lies in {output_dir}", file=sys.stderr)
                sys.exit(130)

        return command

    return decorate


def refuse_taken(output_dir: Path) -> None:
    """Refuse a folder that holds a run.

    Raises:
        FolderTakenError: naming the file by which it is known.
    """
    for file in RUN_FILES:
        if (output_dir / file).exists():
            raise FolderTakenError(output_dir, file)


def compose(
    name: str, overrides: Sequence[str] = (), config_dir: str | None = None, *, return_hydra_config: bool = False
) -> DictConfig:
    """Compose ``conf/NAME.yaml`` as the command line would.

    Raises:
        ConfigError: naming the key, the value and what is allowed.
    """
    register()
    for group in GROUPS:
        if f"{group}=null" in overrides:
            raise ConfigError(f"{group}=null: choose one of {', '.join(_options(group))}")
    folder = str(Path(config_dir).absolute()).replace("'", "\\'") if config_dir else ""
    more = [f"hydra.searchpath=['file://{folder}']"] if config_dir else []
    running, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None  # a command may compose while it runs
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            return hydra.compose(name, [*overrides, *more], return_hydra_config=return_hydra_config)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        places = [CONF, *([Path(config_dir)] if config_dir else [])]
        raise ConfigError(explain(error, overrides, places)) from error
    finally:
        GlobalHydra.instance().hydra = running


def recompose(name: str, more: Sequence[str]) -> DictConfig:
    """Compose what the running command composes, with more overrides; of several for a key the last counts.

    Raises:
        ConfigError: as ``compose`` does.
    """
    flags = get_args_parser().parse_args()
    given = HydraConfig.get().overrides.task if HydraConfig.initialized() else flags.overrides
    last = {override.partition("=")[0].lstrip("+"): override for override in [*given, *more]}
    return compose(flags.config_name or name, list(last.values()), flags.config_dir)


def launcher_overrides() -> list[str]:
    """What the running command was told of Hydra's launcher; empty for the basic one."""
    given = [str(o) for o in HydraConfig.get().overrides.hydra if re.match(r"\+?hydra[./]launcher\b", str(o))]
    return given if any(o.lstrip("+").startswith("hydra/launcher=") and not o.endswith("=basic") for o in given) else []


def jobs(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of every job of a ``--multirun``, as Hydra's basic sweeper makes them.

    Raises:
        ConfigError: for an override that cannot be parsed.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise ConfigError(explain(error, overrides, [CONF])) from error
    choices: dict[str, list[str]] = {}
    for one in parsed:
        key = one.get_key_element()
        try:
            values = one.sweep_string_iterator() if one.is_sweep_override() else []
            choices[key] = [f"{key}={value}" for value in values] or [str(one.input_line)]
        except HydraException:  # glob and interval are for Hydra to expand; every job is checked when it starts
            return []
    return [list(job) for job in itertools.product(*choices.values())]


def option_sections(name: str, config: DictConfig) -> dict[str, DictConfig]:
    """The section of every option of every group, as ``GROUP=OPTION``; none if the schema has no groups."""
    kind = OmegaConf.get_type(config)
    if kind is None or not issubclass(kind, schema.TrainConfig):
        return {}
    choices = [f"{group}={option}" for group in GROUPS for option in _options(group)]
    return {choice: compose(name, [choice])[choice.partition("=")[0]] for choice in choices}


def _options(group: str) -> list[str]:
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


def _refuse_file_as_folder(overrides: Sequence[str]) -> None:
    for override in overrides:
        name, _, value = override.partition("=")
        path = Path(value.strip("'\""))
        if name in ("hydra.run.dir", "hydra.sweep.dir") and any(p.is_file() for p in (path, *path.parents)):
            raise ConfigError(f"{override}: this is a file, or lies below one; name a folder")


def typed(config: DictConfig, kind: type[Config]) -> Config:
    """A composed configuration as the schema's own objects.

    Raises:
        ConfigError: for keys that ``+`` added, missing values and broken interpolations.
    """
    try:
        faults = unknown_keys(config) + [f"{name} is required" for name in sorted(OmegaConf.missing_keys(config))]
        if faults:
            raise ConfigError("\n".join(faults))
        checked = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error, [], [CONF])) from error
    if not isinstance(checked, kind):
        raise ConfigError(f"this configuration lacks its schema, {kind.__name__}; start from a file in {CONF}")
    return checked


@functools.cache
def register() -> None:
    """Tell Hydra of the schemas, and of the names for runs."""
    store = ConfigStore.instance()
    for name, node in SCHEMAS.items():
        store.store(group="schema", name=name, node=node)
    OmegaConf.register_new_resolver("run_name", _run_name)
    OmegaConf.register_new_resolver("comparison_name", _comparison_name)
    OmegaConf.register_new_resolver("moment", moment)


def moment() -> str:
    """The time of day to the microsecond, so that runs started together have folders of their own."""
    return datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")


def _run_name(*, _root_: Any) -> str:
    order = "second_order" if _root_.inner.second_order else "first_order"
    return f"{_task_name(_root_)}/{_root_.algorithm.name}-{order}-seed{_root_.run.seed}-{moment()}"


def _task_name(root: Any) -> str:
    data, task = root.data, root.task
    name = dataset_in_use(data.name, data.get("root"), data.get("fallback"))
    return f"{name}-{task.ways}w{task.shots}s"


def _comparison_name(*, _root_: Any) -> str:
    tasks = _task_name(_root_)
    sections = {str(name): OmegaConf.to_container(_root_[name], resolve=True) for name in _root_ if name != "hydra"}
    return f"{tasks}/{comparison_folder(Path('outputs/comparisons') / tasks, sections, moment())}"


def _stop(error: MetalearnError) -> NoReturn:
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    sys.exit(2)
