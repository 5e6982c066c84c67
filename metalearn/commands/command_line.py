"""Hydra's flags and overrides of a command line, expanded into jobs."""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Iterator, Sequence

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException

import metalearn
from metalearn.commands.output_folders import register_resolvers
from metalearn.commands.shell import invocation
from metalearn.config.compose import compose, search_folders, user_conf_dir
from metalearn.config.messages import format_hydra_error
from metalearn.core.errors import ConfigError
from metalearn.core.quoting import quote_command

_SWITCHES = (
    *(("--help", "-h"), ("--help-all",), ("--hydra-help",), ("--resolve",), ("--run", "-r"), ("--multirun", "-m")),
    ("--shell-completion", "-sc"),
)
_WITH_VALUE = (
    *(("--cfg", "-c"), ("--package", "-p"), ("--config-path", "-cp"), ("--config-name", "-cn")),
    *(("--config-dir", "-cd"), ("--experimental-rerun",)),
)
FLAGS_WITH_VALUE = {flag for flags in (*_WITH_VALUE, ("--info", "-i")) for flag in flags}
FLAGS = FLAGS_WITH_VALUE | {flag for flags in (*_SWITCHES, ("--version",)) for flag in flags}
"""All that a command takes besides ``KEY=VALUE``."""


def parse_flags(name: str, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the flags that Hydra documents, as Hydra does; the rest is ``overrides``.

    Args:
        name: of the command.
        arguments: of the command line; ``None`` takes those of this process.
    """
    start = quote_command(invocation(name))
    parser = argparse.ArgumentParser(start, add_help=False, usage="%(prog)s [KEY=VALUE ...] [FLAG ...]; see --help")
    parser.add_argument("overrides", nargs="*")
    for flags in _SWITCHES:
        parser.add_argument(*flags, action="store_true")
    parser.add_argument(
        "--version", action="version", version=f"metalearn {metalearn.__version__}, with Hydra {hydra.__version__}"
    )
    for flags in _WITH_VALUE:
        parser.add_argument(*flags, choices=["job", "hydra", "all"] if "--cfg" in flags else None)
    info = ["all", "config", "defaults", "defaults-tree", "plugins", "searchpath"]
    parser.add_argument("--info", "-i", const="all", nargs="?", choices=info)
    return parser.parse_args(arguments)


def requested_jobs(name: str, flags: argparse.Namespace) -> Iterator[tuple[list[str], DictConfig, str]]:
    """Yield overrides, configuration and output folder of every job.

    Raises:
        ConfigError: for a flag or an override that cannot be composed.
    """
    register_resolvers()  # also for what Hydra itself prints
    parsed = parse_overrides(flags.overrides)
    _check_flags(name, flags, has_searchpath=any(one.key_or_group == "hydra.searchpath" for one in parsed))
    if flags.info or flags.shell_completion or flags.hydra_help:
        return
    for overrides in sweep_jobs(_expand_globs(parsed, flags.config_dir)) if flags.multirun else [flags.overrides]:
        config = compose(name, overrides, flags.config_dir, return_hydra_config=True)
        try:
            folder = str(config.hydra.sweep.dir if flags.multirun else config.hydra.run.dir)
        except (OmegaConfBaseException, AttributeError):  # a name that cannot be made, of keys that are at fault
            folder = "."
        with open_dict(config):
            del config["hydra"]
        yield overrides, config, folder


def _check_flags(name: str, flags: argparse.Namespace, *, has_searchpath: bool) -> None:
    """Check that no flag reads a pickle, or makes Hydra compose something else than is validated."""
    primary = "the primary files are the shipped ones; put an experiment file into DIR/experiment/ and give "
    primary += "--config-dir DIR experiment=NAME"
    faults = (
        ("--experimental-rerun", flags.experimental_rerun, "a pickle runs any code when it is read; give KEY=VALUE"),
        ("--config-path", flags.config_path, primary),
        ("--config-name", None if flags.config_name == name else flags.config_name, primary),
        ("--cfg", flags.cfg if flags.multirun else None, "one configuration can be printed; leave --multirun out"),
        ("--config-dir", flags.config_dir if has_searchpath else None, "give it or hydra.searchpath=[DIR,...]"),
    )
    if errors := [f"{flag}={value}: {reason}" for flag, value, reason in faults if value is not None]:
        raise ConfigError("\n".join(errors))


def parse_overrides(overrides: Sequence[str]) -> list[Override]:
    """Parse overrides as Hydra does; raise ``ConfigError`` for one that is not in its grammar."""
    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise ConfigError(format_hydra_error(error, overrides)) from error


def _expand_globs(parsed: Sequence[Override], config_dir: str | None) -> list[str]:
    """Return the overrides with every ``glob`` over the options of a group replaced by their list."""
    places, lines = search_folders([str(one.input_line) for one in parsed], config_dir), []
    for one in parsed:
        value, group = one.value(), one.key_or_group
        options = sorted({file.stem for place in places for file in (place / group).glob("*.yaml")})
        found: list[str] = value.filter(options) if isinstance(value, Glob) else []
        if isinstance(value, Glob) and not found:
            raise ConfigError(f"{one.input_line}: no option of {group} fits; there are {', '.join(options) or 'none'}")
        lines.append(f"{one.get_key_element()}={','.join(found)}" if found else str(one.input_line))
    return lines


def recompose_with(name: str, more: Sequence[str]) -> DictConfig:
    """Compose what the running command composes, with more overrides; the last of several for a key counts.

    Raises:
        ConfigError: as ``compose`` does.
    """
    flags = parse_flags(name)
    given = HydraConfig.get().overrides.task if HydraConfig.initialized() else flags.overrides
    last = {override.partition("=")[0].lstrip("+"): override for override in [*given, *more]}
    return compose(name, list(last.values()), flags.config_dir)


def command_again(name: str, *more: str) -> str:
    """Return the running command as it would be typed again, with more overrides and without a folder of its own."""
    replaced = {override.partition("=")[0] for override in more}
    given = list(HydraConfig.get().overrides.task)
    kept = [override for override in given if override.lstrip("+").partition("=")[0] not in {*replaced, "run.resume"}]
    sources = HydraConfig.get().runtime.config_sources
    folders = [source.path for source in sources if source.provider == "command-line"]
    flags = [f"--config-dir={folder}" for folder in folders if folder != user_conf_dir(given)]
    return quote_command([*invocation(name), *flags, *kept, *more])


def is_sweep() -> bool:
    """Return whether this is a job of a ``--multirun``."""
    return HydraConfig.get().mode == RunMode.MULTIRUN


def launcher_overrides() -> list[str]:
    """Return the running command's overrides for Hydra's launcher; none for the basic one."""
    given = [str(o) for o in HydraConfig.get().overrides.hydra if re.match(r"\+?hydra[./]launcher\b", str(o))]
    return given if any(o.lstrip("+").startswith("hydra/launcher=") and not o.endswith("=basic") for o in given) else []


def sweep_jobs(overrides: Sequence[str]) -> list[list[str]]:
    """Return the overrides of every job of a ``--multirun``, as Hydra's basic sweeper makes them.

    Raises:
        ConfigError: for an override that cannot be parsed.
    """
    choices: dict[str, list[str]] = {}
    for one in parse_overrides(overrides):
        key = one.get_key_element()
        try:
            values = one.sweep_string_iterator() if one.is_sweep_override() else []
            choices[key] = [f"{key}={value}" for value in values] or [str(one.input_line)]
        except HydraException as error:
            raise ConfigError(
                f"{one.input_line}: this cannot be expanded into jobs before they start, so that they could not be "
                "checked; list the values instead, KEY=a,b,c"
            ) from error
    return [list(job) for job in itertools.product(*choices.values())]
