"""Limits of the YAML in a run's folder, which a stranger may have written: a small file must not grow in memory."""

from __future__ import annotations

from pathlib import Path

import yaml

from metalearn.core.errors import ConfigError

_MAX_CHARACTERS, _MAX_VALUES, _MAX_DEPTH = 1_000_000, 20_000, 20


def read_yaml(path: Path) -> str:
    """Read the text of a YAML file, which is not parsed, only as far as ``check_yaml`` allows.

    Raises:
        OSError: if it cannot be read.
        UnicodeDecodeError: if it is no text.
    """
    with path.open(encoding="utf-8") as file:
        return file.read(_MAX_CHARACTERS + 1)


def check_yaml(text: str) -> None:
    """Check the size of YAML before it is parsed.

    Raises:
        ConfigError: if it is longer, has more values or is nested deeper than a configuration, or holds an alias.
        YAMLError: if it is no YAML.
    """
    if len(text) > _MAX_CHARACTERS:
        raise ConfigError(f"it has more than {_MAX_CHARACTERS:,} characters")
    values = depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        values += isinstance(event, yaml.NodeEvent)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        line = f"line {event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(f"{line}: *{event.anchor} repeats another value; write that value itself")
        if values > _MAX_VALUES:
            raise ConfigError(f"{line}: it has more than {_MAX_VALUES:,} keys and values")
        if depth > _MAX_DEPTH:
            raise ConfigError(f"{line}: it is nested more than {_MAX_DEPTH} deep")
