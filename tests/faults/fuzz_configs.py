"""Overrides and experiment files at random: what was asked for, or a ``ConfigError`` that says where the fault is."""

from __future__ import annotations

import re
import shutil
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints
from unittest import mock

import yaml

from metalearn.config.compose import compose, to_dataclass
from metalearn.config.run_config import resolve_data
from metalearn.config.schema import TrainConfig, iter_fields
from metalearn.config.validation import validate_train_config
from metalearn.core.errors import ConfigError
from metalearn.data import metadata as catalog
from tests.faults.fuzz_texts import KEYS, RIGHT, Case


def hold(case: Case, folder: Path) -> None:
    """What was asked for and is right, of the right types; or a ``ConfigError`` that names a key or the file."""
    shutil.rmtree(folder / "experiment", ignore_errors=True)
    if case.file is not None:
        (folder / "experiment").mkdir()
        (folder / "experiment" / "mine.yaml").write_bytes(case.file)
    try:
        with mock.patch.object(catalog, "_reachable", return_value=False):
            composed = compose("train", case.overrides, str(folder) if case.file is not None else None)
            config = to_dataclass(composed, TrainConfig)
            validate_train_config(config)
            resolve_data(config)
    except ConfigError as error:
        _must_name_a_place(str(error), case)
        return
    right = dict(override.split("=") for override in case.overrides if override in RIGHT)
    for name, value in iter_fields(config):
        section, _, key = name.partition(".")
        kind = get_type_hints(type(getattr(config, section)))[key]
        assert _fits(value, kind), f"{name}={value!r} is no {kind}"
        if name in right and set(case.overrides) <= set(RIGHT):
            assert value == yaml.safe_load(right[name]), f"{name}={value!r}, and {right[name]} was asked for"


def _must_name_a_place(said: str, case: Case) -> None:
    keys = {key for key in KEYS if any(key in override for override in case.overrides)}
    if case.file is not None:
        keys |= {"mine", "YAML", *KEYS}
    parts = {part for key in keys for part in (key, key.partition(".")[0], key.rpartition(".")[2])}
    if not any(part in said for part in parts) and not (case.file and re.match(r"\S+[=:]", said)):
        raise AssertionError(f"{said}\nnames none of {sorted(parts)}")


def _fits(value: Any, kind: Any) -> bool:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(_fits(value, each) for each in arguments)
    if origin is Literal:
        return any(value == each and type(value) is type(each) for each in arguments)
    if origin is list:
        return isinstance(value, list) and all(_fits(v, arguments[0]) for v in value)
    return type(value) is kind
