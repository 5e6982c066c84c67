"""Refuse unknown, mistyped, missing and out-of-range keys before anything is loaded."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from metalearn.config.compatibility import find_conflicts
from metalearn.config.messages import format_errors
from metalearn.config.options import AnyData, OmniglotConfig, TorchvisionConfig
from metalearn.config.schema import TrainConfig
from metalearn.config.target import target_errors
from metalearn.core.errors import ConfigError, DataError
from metalearn.data.metadata import resolve_dataset

Config = TypeVar("Config")


def from_dict(
    plain: dict[str, Any],
    kind: type[Config],
    errors: Mapping[str, str],
    file_of: Callable[[str], str] = lambda key: "",
) -> Config:
    """Return a configuration as an object of its schema.

    Args:
        plain: every section, as a dictionary.
        kind: the schema.
        errors: messages by key that are known already.
        file_of: as in ``format_errors``.

    Raises:
        ConfigError: listing every error of every key.
    """
    schema: Any = kind
    found: dict[str, str] = {}
    try:
        config: Config = _adapter(schema).validate_python(plain)
    except ValidationError as error:
        found = format_errors(error, kind, plain, file_of)
    if messages := {**found, **errors}:
        raise ConfigError("\n".join(messages.values()))
    return config


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def validate_train_config(config: TrainConfig, *, trains: bool = True) -> None:
    """Check that a configuration can be trained, before any data are loaded; its targets are imported.

    Args:
        config: a training's.
        trains: whether it is to be trained with; a model that a GPU trained in TF32 can be tested on a CPU.

    Raises:
        ConfigError: listing every key that does not fit another.
    """
    messages = find_conflicts(config, trains=trains)
    messages += target_errors(config.targets())
    if not messages:
        try:
            _check_data(config.data)
        except DataError as error:
            messages.append(str(error))
    if messages:
        raise ConfigError("\n".join(messages))


def _check_data(data: AnyData) -> None:
    """Check that Omniglot is there, or that torchvision has the data set; nothing is read."""
    if isinstance(data, OmniglotConfig):
        resolve_dataset(data.name, data.root, data.fallback)
    elif isinstance(data, TorchvisionConfig):
        from metalearn.data.torchvision_parts import find_dataset  # torchvision's import is slow

        find_dataset(data.dataset, data.options)
