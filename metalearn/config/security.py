"""No configuration names code that Hydra would call, import, export or overwrite because a file says so.

Hydra's own section holds callbacks, loggers and launchers as names of Python objects. It is read as text here, before
anything in it is resolved or used, and whatever this project does not need is an error. Imports only the standard
library.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from metalearn.core.errors import ConfigError

CLI_ONLY_SECTIONS = ("launcher", "sweeper")
"""Sections that only the command line sets: a launcher's settings end in shell scripts."""

_PLUGIN = re.compile(r"(hydra\._internal\.core_plugins|hydra_plugins)(\.\w+)+")
_LOGGERS = (
    *("logging.FileHandler", "logging.Formatter", "logging.NullHandler", "logging.StreamHandler"),
    "rich.logging.RichHandler",
)
_STREAMS = ("ext://sys.stdout", "ext://sys.stderr")
_LOG_FILE = "${hydra.runtime.output_dir}/${hydra.job.name}.log"

Path = tuple[str, ...]


def check_flags(flags: Mapping[str, Any], searchpath: Sequence[Any], primary_files: Collection[str]) -> None:
    """Check that no flag runs code while Hydra only reads, or makes Hydra read what is not checked here.

    Args:
        flags: of the command line.
        searchpath: value of ``hydra.searchpath`` on the command line.
        primary_files: names of the shipped ones, in ``conf/``.

    Raises:
        ConfigError: naming the flag and what to write instead.
    """
    instead = "Put an experiment file into DIR/experiment/ and give --config-dir DIR experiment=NAME"
    rerun, path, name = flags["experimental_rerun"], flags["config_path"], flags["config_name"]
    errors = []
    if rerun is not None:
        errors.append(
            f"--experimental-rerun={rerun}: a pickle can run any code when it is read. Give KEY=VALUE instead"
        )
    if path is not None:
        errors.append(f"--config-path={path}: the primary files are the shipped ones. {instead}")
    if name is not None and name not in primary_files:
        names = ", ".join(sorted(primary_files))
        errors.append(f"--config-name={name}: must be one of the shipped files, {names}. {instead}")
    if flags["config_dir"] is not None and searchpath:
        errors.append("hydra.searchpath and --config-dir: give one of them; hydra.searchpath takes several folders")
    for place in searchpath:
        if not isinstance(place, str) or ("://" in place and not place.startswith("file://")):
            errors.append(f"hydra.searchpath={place}: must be a folder; other sources import Python packages")
    _raise_if(errors)


def check_no_code(config: Any, *, given: Collection[str], chosen: Mapping[str, Any]) -> None:
    """Check that a configuration names no code, command or environment variable.

    Args:
        config: as it was composed, as plain containers, nothing resolved, with the section ``hydra``.
        given: the overrides of the command line.
        chosen: ``launcher`` and ``sweeper`` as the command line alone sets them.

    Raises:
        ConfigError: naming every such key, its value, why, and what to do.
    """
    errors = []
    if not isinstance(config, dict) or not isinstance(config.get("hydra"), dict):
        raise ConfigError("hydra: the section is missing, or stands for another. Leave it as it is in conf/.")
    for path, value in _leaves(config):
        if (reason := _why_forbidden(path, value, given)) is not None:
            errors.append(f"{'.'.join(path)}={str(value)[:100]}: {reason}")
    for section, alone in chosen.items():
        errors += _set_by_files(section, config["hydra"].get(section), alone)
    _raise_if(errors)


def _why_forbidden(path: Path, value: Any, given: Collection[str]) -> str | None:
    """Return why a value is forbidden, and what to do; ``None`` if it is harmless."""
    place = path[1:]
    if path[-1] == "_target_" or "_target_" in path[:-1]:
        if place in (("launcher", "_target_"), ("sweeper", "_target_")) and _PLUGIN.fullmatch(str(value)):
            return None
        return "this names code to run, which no configuration may. Remove it; a launcher must be a plugin of Hydra"
    if path[0] != "hydra" or value is None:
        return None
    if len(path) == 1 or (len(path) == 2 and "${" in str(value)):
        return "Hydra's own keys must be spelt out. Write the value itself"
    if place[0] == "callbacks":
        return "callbacks are code, and none is taken from a configuration. Remove the key"
    if place[:2] in (("job", "env_set"), ("job", "env_copy")):
        return "a configuration sets no environment variables. Set them in the shell, before the command"
    if place[:2] == ("sweeper", "params"):
        return "give what is swept on the command line (KEY=A,B), where every job is checked before the first"
    if place[0] == "overrides" and value not in given:
        return "overrides stand on the command line and nowhere else. Remove the key"
    if place == ("output_subdir",) and value != ".hydra":
        return "must be null or .hydra, so that nothing is written outside of a run's folder"
    if place == ("job", "name") and not re.fullmatch(r"[\w-]+", str(value)):
        return "must be letters, digits, _ and -, as a log file is called by it"
    return _why_forbidden_in_logging(path, value) if place[0] in ("job_logging", "hydra_logging") else None


def _why_forbidden_in_logging(path: Path, value: Any) -> str | None:
    if "()" in path or "." in path:
        return "this calls a function of its choice, or sets attributes. Remove it; handlers and formats are enough"
    if path[-1] == "class":
        return None if value in _LOGGERS else f"must be one of {', '.join(_LOGGERS)}"
    if path[-1] == "filename":
        return None if value == _LOG_FILE else f"must be {_LOG_FILE}, so that no other file is written"
    if re.match(r"\w+://", str(value)) and value not in _STREAMS:
        return f"this fetches a Python object of its choice. Only {' and '.join(_STREAMS)} are taken"
    return "the settings of loggers must be spelt out. Write the value itself" if "${" in str(value) else None


def _set_by_files(section: str, composed: Any, alone: Any) -> list[str]:
    """Return an error for every key of a section that is not as the command line alone sets it."""
    now, before = dict(_leaves(composed)), dict(_leaves(alone))
    keys = [key for key in now if key not in before or now[key] != before[key]]
    keys += [key for key in before if key not in now and not any(other[: len(key)] == key for other in now)]
    if ("_target_",) in keys:
        keys = [("_target_",)]  # another launcher has other settings
    return [
        f"{'.'.join(('hydra', section, *key))}={str(now.get(key))[:100]}: a file sets it, and such settings end in "
        f"shell scripts. Set it on the command line: hydra/{section}=NAME hydra.{section}.KEY=VALUE"
        for key in keys
    ]


def _leaves(node: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Iterate over all values that are no containers, with the keys that lead to them."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, (*path, str(key)))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _leaves(value, (*path, str(index)))
    else:
        yield path, node


def _raise_if(errors: Sequence[str]) -> None:
    if errors:
        raise ConfigError("\n".join(f"{error}." for error in errors))
