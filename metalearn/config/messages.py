"""What a user is told of the configuration: every key on ``--help``, and the key at fault when one is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from hydra.errors import OverrideParseException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError
from yaml import YAMLError

from metalearn.config.validation import describe_allowed, iter_fields

GROUPS = ("algorithm", "data", "model")


def help_text(config: DictConfig, script: str, description: str, options: Mapping[str, DictConfig]) -> str:
    """Every key of a configuration with its default, meaning and range.

    Args:
        config: composed, without overrides.
        script: the words that start the command.
        description: what it does.
        options: sections of the groups' options, by ``GROUP=OPTION``; a group without one is a plain section.
    """
    lines = [
        inspect.cleandoc(description),
        "",
        f"usage: {script} [KEY=VALUE ...] [GROUP=OPTION ...] [--cfg job] [--multirun] [--hydra-help]",
        "",
        "Keys, with their defaults:",
    ]
    if own := _section("", config):
        lines += ["", *own]
    grouped = {name.partition("=")[0] for name in options}
    for section in config:
        node = config._get_node(section)
        if section not in grouped and isinstance(node, DictConfig):
            lines += ["", *_section(str(section), node)]
    for name, node in options.items():
        lines += ["", f"With {name}:", *_section(name.partition("=")[0], node)]
    if options:
        lines += ["", "experiment=NAME sets the keys that conf/experiment/NAME.yaml holds; --cfg job shows the result."]
    return "\n".join(lines)


def _section(section: str, node: DictConfig) -> list[str]:
    """A line for every key that is no section itself; ``section`` is empty for those that stand in none."""
    lines = []
    kind = OmegaConf.get_type(node)
    for f in dataclasses.fields(kind):  # type: ignore[arg-type]  # a section's type is its schema
        if isinstance(node._get_node(f.name), DictConfig):
            continue
        default = _as_yaml(OmegaConf.to_container(node, resolve=False)[f.name])  # type: ignore[index,call-overload]
        meaning = f"{f.metadata['meaning']} ({describe_allowed(f, get_type_hints(kind)[f.name])})"
        head = f"  {section}{'.' if section else ''}{f.name}={default}"
        lines += textwrap.wrap(meaning, 118, initial_indent=f"{head:<34}  ", subsequent_indent=" " * 36)
    return lines


def _as_yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return "(required)" if value == "???" else str(value)


def format_hydra_error(error: Exception, overrides: Sequence[str], places: list[Path]) -> str:
    """A refusal by Hydra or OmegaConf in the words of the schema: the key, the value, what is allowed.

    Args:
        error: what was raised.
        overrides: of the command line, to quote the value that was given.
        places: folders of YAML files, to quote the value from the one at fault.
    """
    cause = _cause(error)
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override}: {error}\nWrite KEY=VALUE without spaces, and quote a value that holds ~, = or commas, "
            "as in \"KEY=['a=1','b=2']\"."
        )
    if isinstance(error, YAMLError):
        return f"a YAML file cannot be read: {error}"
    if cause is None or cause.full_key in (None, "", "_dummy_"):  # Hydra's stand-in for a group
        text = re.sub(r"\nConfig search path:.*", "", str(error), flags=re.DOTALL).strip() or type(error).__name__
        if found := re.search(r"Could not find '(\w+)/(\w+)'", text):
            close = difflib.get_close_matches(found[2], re.findall(r"^\t(\w+)$", text, flags=re.MULTILINE), n=1)
            text += f"\nDid you mean {found[1]}={close[0]}?" if close else ""
        named = any(override.partition("=")[0].lstrip("+~") in text for override in overrides)
        return text if named or not overrides else f"{' '.join(overrides)}: this cannot be composed: {text}"
    source = re.match(r"In '(.+?)':", str(error))
    key, where = str(cause.full_key), f" (in {source[1]}.yaml)" if source else ""
    value = cause.value if cause.value is not None else _given(key, overrides, source[1] if source else None, places)
    shown = key if value is None else f"{key}={value}"
    kind = cause.object_type
    if dataclasses.is_dataclass(kind):
        known = {f.name: f for f in dataclasses.fields(kind)}
        if isinstance(cause, (ConfigKeyError, ConfigAttributeError)):
            return f"{shown}: there is no such key{where}. {_nearest(key, kind)}"
        if isinstance(cause, ValidationError) and (f := known.get(str(cause.key))) and f.metadata:
            return (
                f"{shown}: must be {describe_allowed(f, get_type_hints(kind)[f.name])}{where} ({f.metadata['meaning']})"
            )
    return f"{shown}: {str(cause).splitlines()[0]}{where}"


def _cause(error: BaseException | None) -> OmegaConfBaseException | None:
    while error is not None:
        if isinstance(error, OmegaConfBaseException):
            return error
        error = error.__cause__ or error.__context__
    return None


def _given(key: str, overrides: Sequence[str], source: str | None, places: list[Path]) -> Any:
    """The value that the command line or the YAML file at fault gives the key, if it can be found."""
    for override in overrides:
        name, _, value = override.partition("=")
        if name.lstrip("+~") == key:
            return value
    for place in places if source else []:
        file = place / f"{source}.yaml"
        if file.is_file():
            with contextlib.suppress(OmegaConfBaseException, OSError):  # a file that is no dictionary, say
                return OmegaConf.select(OmegaConf.load(file), key)
    return None


def _nearest(key: str, kind: Any) -> str:
    """What was probably meant, and the keys that there are in a section of this type."""
    known = [f.name for f in dataclasses.fields(kind)]
    prefix, _, last = key.rpartition(".")
    if key == "experiment":
        return "A file in experiment/ must open with the line '# @package _global_'."
    inside = [] if prefix else [f"{s}.{key}" for s in known if key in _keys_of(get_type_hints(kind)[s])]
    if inside:
        return f"Did you mean {' or '.join(inside)}?"
    dot = "." if prefix else ""
    close = difflib.get_close_matches(last, known, n=1)
    hint = f"Did you mean {prefix}{dot}{close[0]}? " if close else ""
    return f"{hint}The keys{' of ' + prefix if prefix else ''} are {', '.join(known)}."


def _keys_of(section: type) -> set[str]:
    """The keys of a section, whichever option of its group is chosen; none of a key that is no section."""
    if not dataclasses.is_dataclass(section):
        return set()
    return {f.name for kind in (section, *section.__subclasses__()) for f in dataclasses.fields(kind)}


def unknown_keys(config: DictConfig, prefix: str = "") -> list[str]:
    """Keys that ``+key=value`` added to a typed section; Hydra lets them pass."""
    kind = OmegaConf.get_type(config)
    known = [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
    faults = []
    for name in config:
        node, full = config._get_node(name), f"{prefix}{name!s}"
        if known and name not in known:
            faults.append(f"{full}={config[name]}: there is no such key. {_nearest(full, kind)}")
        elif isinstance(node, DictConfig):
            faults += unknown_keys(node, f"{full}.")
    return faults


def missing_key_error(config: DictConfig, name: str) -> str:
    """That a key has no value, and what it means."""
    section, _, key = name.rpartition(".")
    kind = OmegaConf.get_type(OmegaConf.select(config, section)) if section else OmegaConf.get_type(config)
    meaning = next((f.metadata.get("meaning") for f in dataclasses.fields(kind) if f.name == key), None)  # type: ignore[arg-type]
    return f"{name} is required" + (f": {meaning}" if meaning else "")


def missing_sections(config: Any) -> list[str]:
    """What deletions and interpolations took away unnoticed by OmegaConf: ``~inner``, ``run=${task.ways}``."""
    replaced = [
        f"{name}={getattr(config, name)}: must be a section, with the keys {', '.join(sorted(keys))}."
        for name, kind in get_type_hints(type(config)).items()
        if (keys := _keys_of(kind)) and not isinstance(getattr(config, name), kind)
    ]
    return replaced or [f"{name} is required" for name, value, _, _ in iter_fields(config) if value == MISSING]
