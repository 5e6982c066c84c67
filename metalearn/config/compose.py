"""From ``conf/`` and overrides to a typed configuration, by Hydra; ``command.py`` and ``overrides.py`` know it too."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from metalearn.config import commands_schema as schema_commands
from metalearn.config import schema
from metalearn.config.messages import GROUPS, format_hydra_error, missing_key_error, missing_sections, unknown_keys
from metalearn.config.output_names import comparison_dir_name
from metalearn.core.errors import ConfigError
from metalearn.data.metadata import resolve_dataset

_REFUSALS = (
    *(HydraException, OmegaConfBaseException, YAMLError),
    *(ValueError, TypeError, AttributeError, AssertionError, RecursionError, OSError),
)
"""What Hydra and OmegaConf raise for input that they cannot take; not all of it is of their own classes."""

CONF = next(p for p in (Path(__file__).parents[1] / "conf", Path(__file__).parents[2] / "conf") if p.is_dir())
"""The shipped configuration: inside the package where that was installed, at the top level of a checkout."""

Config = TypeVar("Config")

SCHEMAS: dict[str, type] = {
    "train": schema.TrainConfig,
    "adapt": schema_commands.AdaptConfig,
    "benchmark": schema_commands.BenchmarkConfig,
    "compare": schema_commands.CompareConfig,
    "evaluate": schema_commands.EvaluateConfig,
    "gradients": schema_commands.GradientsConfig,
    "reproduce": schema_commands.ReproduceConfig,
    "verify": schema_commands.VerifyConfig,
    **dict.fromkeys(schema.PLAIN_ALGORITHMS, schema.AlgorithmConfig),
    "maml_pp": schema.MAMLPPConfig,
    "imaml": schema.IMAMLConfig,
    "omniglot": schema.OmniglotConfig,
    "glyphs": schema.GlyphsConfig,
    "images": schema.ImagesConfig,
    "sinusoid": schema.SinusoidConfig,
    "conv4": schema.Conv4Config,
    "mlp": schema.MLPConfig,
    "resnet12": schema.ResNet12Config,
}


def compose(
    name: str, overrides: Sequence[str] = (), config_dir: str | None = None, *, return_hydra_config: bool = False
) -> DictConfig:
    """Compose ``conf/NAME.yaml`` as the command line would.

    Raises:
        ConfigError: naming the key, the value and what is allowed.
    """
    register_schemas()
    config_dir = config_dir or user_conf_dir(overrides)
    for group in GROUPS:
        if f"{group}=null" in overrides:
            raise ConfigError(f"{group}=null: choose one of {', '.join(options(group))}")
    running, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None  # a command may compose while it runs
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            return hydra.compose(
                name, [*overrides, *searchpath_override(config_dir)], return_hydra_config=return_hydra_config
            )
    except _REFUSALS as error:
        places = [CONF, *([Path(config_dir)] if config_dir else [])]
        raise ConfigError(format_hydra_error(error, overrides, places)) from error
    finally:
        GlobalHydra.instance().hydra = running


def user_conf_dir(overrides: Sequence[str] = ()) -> str | None:
    """Return the user's ``conf/`` in the current directory, which adds groups and experiments.

    Returns:
        ``None`` if there is none, or if the overrides say where to search.
    """
    folder = Path("conf").absolute()
    told = any(override.lstrip("+").startswith("hydra.searchpath=") for override in overrides)
    return None if told or not folder.is_dir() or folder.samefile(CONF) else str(folder)


def searchpath_override(config_dir: str | None) -> list[str]:
    """The flag ``--config-dir`` as the override that means the same."""
    folder = str(Path(config_dir).absolute()).replace("'", "\\'") if config_dir else ""
    return [f"hydra.searchpath=['file://{folder}']"] if config_dir else []


def group_defaults(name: str, config: DictConfig) -> dict[str, DictConfig]:
    """The section of every option of every group, as ``GROUP=OPTION``; none if the schema has no groups."""
    kind = OmegaConf.get_type(config)
    if kind is None or not issubclass(kind, schema.TrainConfig):
        return {}
    choices = [f"{group}={option}" for group in GROUPS for option in options(group)]
    return {choice: compose(name, [choice])[choice.partition("=")[0]] for choice in choices}


def options(group: str, config_dir: str | None = None) -> list[str]:
    """Return the names of a group's options, with those that ``config_dir`` adds."""
    folders = [CONF, *([Path(config_dir)] if config_dir else [])]
    return sorted({file.stem for folder in folders for file in (folder / group).glob("*.yaml")})


def to_dataclass(config: DictConfig, kind: type[Config]) -> Config:
    """A composed configuration as the schema's own objects.

    Raises:
        ConfigError: for keys that ``+`` added, missing values and broken interpolations.
    """
    try:
        faults = unknown_keys(config) + [
            missing_key_error(config, name) for name in sorted(OmegaConf.missing_keys(config))
        ]
        if faults:
            raise ConfigError("\n".join(faults))
        checked = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ConfigError(format_hydra_error(error, [], [CONF])) from error
    if not isinstance(checked, kind):
        raise ConfigError(f"this configuration lacks its schema, {kind.__name__}; start from a file in {CONF}")
    if faults := missing_sections(checked):
        raise ConfigError("\n".join(faults))
    return checked


@functools.cache
def register_schemas() -> None:
    """Tell Hydra of the schemas, and of the names for runs."""
    store = ConfigStore.instance()
    for name, node in SCHEMAS.items():
        store.store(group="schema", name=name, node=node)
    OmegaConf.register_new_resolver("run_name", _run_name)
    OmegaConf.register_new_resolver("comparison_name", _comparison_name)
    OmegaConf.register_new_resolver("moment", timestamp)


def timestamp() -> str:
    """The time of day to the microsecond, so that runs started together have folders of their own."""
    return datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")


def _run_name(*, _root_: Any) -> str:
    order = "second_order" if _root_.inner.second_order else "first_order"
    return f"{_task_name(_root_)}/{_root_.algorithm.name}-{order}-seed{_root_.run.seed}-{timestamp()}"


def _task_name(root: Any) -> str:
    data, task = root.data, root.task
    name = resolve_dataset(data.name, data.get("root"), data.get("fallback"))
    return f"{name}-{task.shots}s" if name == "sinusoid" else f"{name}-{task.ways}w{task.shots}s"


def _comparison_name(*, _root_: Any) -> str:
    tasks = _task_name(_root_)
    sections = {str(name): OmegaConf.to_container(_root_[name], resolve=True) for name in _root_ if name != "hydra"}
    return f"{tasks}/{comparison_dir_name(Path('outputs/comparisons') / tasks, sections, timestamp())}"
