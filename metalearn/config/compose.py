"""Compose ``conf/`` and overrides into a configuration by Hydra, and validate it."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from metalearn.config.former_keys import drop_removed_keys, rename_keys, rename_overrides
from metalearn.config.messages import GROUPS, file_setting, format_hydra_error
from metalearn.config.schema import TrainConfig
from metalearn.config.validation import from_dict
from metalearn.core.errors import ConfigError
from metalearn.core.quoting import format_override

_REFUSALS = (
    *(HydraException, OmegaConfBaseException, YAMLError),
    *(ValueError, TypeError, AttributeError, AssertionError, RecursionError, OSError),
)
"""Errors of Hydra and OmegaConf for input that they cannot take; not all are of their own classes."""

CONF = next(p for p in (Path(__file__).parents[1] / "conf", Path(__file__).parents[2] / "conf") if p.is_dir())
"""The shipped configuration: inside the package where that was installed, at the top level of a checkout."""

Config = TypeVar("Config")


def compose(
    name: str, overrides: Sequence[str] = (), config_dir: str | None = None, *, return_hydra_config: bool = False
) -> DictConfig:
    """Compose ``conf/NAME.yaml`` as the command line would; ``to_dataclass`` validates it.

    Raises:
        ConfigError: naming the override or file that cannot be composed.
    """
    overrides = rename_overrides(name, overrides)
    config_dir = config_dir or user_conf_dir(overrides)
    _check_groups(overrides, config_dir)
    running, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None  # a command may compose while it runs
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            folders = search_folders(overrides, config_dir)
            given = [*(_allow_unknown(o, folders) for o in overrides), *searchpath_override(config_dir)]
            return hydra.compose(name, given, return_hydra_config=return_hydra_config)
    except _REFUSALS as error:
        raise ConfigError(format_hydra_error(error, overrides)) from error
    finally:
        GlobalHydra.instance().hydra = running


def _check_groups(overrides: Sequence[str], config_dir: str | None) -> None:
    """Check that the option of a group is neither left out nor chosen by its name alone, without its other keys."""
    given = {key.lstrip("+"): value.strip("'") for key, _, value in (o.partition("=") for o in overrides)}
    for group in GROUPS:
        chosen, name = given.get(group), given.get(f"{group}.name")
        if chosen == "null":
            raise ConfigError(f"{group}=null: choose one of {', '.join(options(group, config_dir))}")
        if name not in (None, chosen) and name in options(group, config_dir):
            raise ConfigError(f"{group}.name={name}: choose an option as a whole, {group}={name}")


def user_conf_dir(overrides: Sequence[str] = ()) -> str | None:
    """Return the user's ``conf/`` in the current directory, which adds groups and experiments.

    Returns:
        ``None`` if there is none, or if the overrides say where to search.
    """
    folder = Path("conf").absolute()
    told = any(override.lstrip("+").startswith("hydra.searchpath=") for override in overrides)
    return None if told or not folder.is_dir() or folder.samefile(CONF) else str(folder)


def _allow_unknown(override: str, folders: Sequence[Path]) -> str:
    """Let Hydra pass a key that it does not know, so that validation names all of them at once."""
    found = re.match(r"(?!hydra\b)(\w[\w.]*)=", override)
    is_key = found and not any((folder / found[1]).is_dir() for folder in folders)
    return f"++{override}" if is_key else override


def allow_new_options(overrides: Iterable[str]) -> list[str]:
    """Return overrides with which Hydra adds to ``options``, which are empty in ``conf/``."""
    return [f"++{o}" if re.match(r"\w+\.(\w+_)?options[.=]", o) else o for o in overrides]


def searchpath_override(config_dir: str | None) -> list[str]:
    """Return the flag ``--config-dir`` as the override that means the same."""
    return [f"hydra.searchpath={format_override([f'file://{Path(config_dir).absolute()}'])}"] if config_dir else []


def search_folders(overrides: Sequence[str], config_dir: str | None = None) -> list[Path]:
    """Return the folders in which Hydra looks for files, ``conf/`` last."""
    given = [o.partition("=")[2].strip("[]").split(",") for o in overrides if o.startswith("hydra.searchpath=")]
    named = [place.strip(" '\"").removeprefix("file://") for places in given for place in places]
    return [*map(Path, named), *([Path(config_dir)] if config_dir else []), CONF]


def group_defaults(kind: type) -> Mapping[str, DictConfig]:
    """Return the section of every option of every group, as ``GROUP=OPTION``; none if the command has no groups."""
    return _group_sections() if issubclass(kind, TrainConfig) else {}


@functools.cache  # composing twenty configurations takes seconds
def _group_sections() -> Mapping[str, DictConfig]:
    choices = [f"{group}={option}" for group in GROUPS for option in options(group)]
    return {choice: compose("train", [choice])[choice.partition("=")[0]] for choice in choices}


def options(group: str, config_dir: str | None = None) -> list[str]:
    """Return the names of a group's options, with those that ``config_dir`` adds."""
    return sorted({file.stem for folder in search_folders((), config_dir) for file in (folder / group).glob("*.yaml")})


def to_dataclass(
    config: DictConfig, kind: type[Config], overrides: Sequence[str] = (), config_dir: str | None = None
) -> Config:
    """Validate a composed configuration, and return it as an object of its schema.

    Args:
        config: composed.
        kind: the schema.
        overrides: that it was composed with; for messages, and because they count more than former names in files.
        config_dir: of the flag ``--config-dir``, for messages.

    Raises:
        ConfigError: listing every key that is unknown, missing, of the wrong type or out of range, and every conflict.
    """
    errors: dict[str, str] = {}
    try:
        plain = resolve_values(config, errors)
    except RecursionError:
        raise ConfigError(f"{' '.join(overrides)}: this refers to itself, without end") from None
    rename_keys(plain, {override.partition("=")[0].lstrip("+") for override in overrides})
    errors |= drop_removed_keys(plain)
    folders = search_folders(overrides, config_dir or user_conf_dir(overrides))
    return from_dict(plain, kind, errors, lambda key: file_setting(key, overrides, folders))


def resolve_values(config: DictConfig, errors: dict[str, str], prefix: str = "") -> dict[str, Any]:
    """Return plain dictionaries with interpolations resolved and without missing values."""
    result: dict[str, Any] = {}
    for key in config:
        full = f"{prefix}{key!s}"
        if OmegaConf.is_missing(config, key):
            continue
        try:
            value = config[key]
            if isinstance(value, DictConfig):
                value = resolve_values(value, errors, f"{full}.")
            elif isinstance(value, ListConfig):
                value = OmegaConf.to_container(value, resolve=True)
        except OmegaConfBaseException as error:
            errors[full] = f"{full}: {str(error).splitlines()[0]}"
            value = None
        result[str(key)] = value
    return result
