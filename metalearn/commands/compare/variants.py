"""The variants of a comparison: one configuration each, checked before anything is trained.

A variant's overrides count as if they stood last on the command line, so that what depends on them (``eval.queries``
on ``task.shots``) follows. A run is then ``scripts/train.py`` with every key spelt out.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metalearn.commands.command_line import recompose_with
from metalearn.commands.output_folders import split, variant_names
from metalearn.config.commands_schema import CompareConfig
from metalearn.config.compose import to_dataclass
from metalearn.config.run_config import resolve_data
from metalearn.config.schema import TrainConfig, iter_fields
from metalearn.config.validation import validate_train_config
from metalearn.core.errors import ConfigError
from metalearn.core.quoting import format_override

_COMPARISON_KEYS = ("run.seed", "run.resume", "compare", "hydra")
"""Beginnings of keys that a variant may not override."""
_KEYS_OF_LAUNCHER = ("run.seed", "run.resume")
"""Keys that are added to a run's overrides when it is launched."""


@dataclass(frozen=True)
class Variant:
    """A configuration that is compared with others, for its first seed; overrides are as the user wrote them."""

    name: str
    overrides: list[str]
    config: TrainConfig


@dataclass(frozen=True)
class Job:
    """One run of a comparison: the variant's name, the output folder, and the whole configuration."""

    variant: str
    folder: Path
    config: TrainConfig

    @property
    def overrides(self) -> list[str]:
        """Every key of the configuration, for ``scripts/train.py``, without the keys that the launcher adds."""
        groups = [f"{group}={getattr(self.config, group).name}" for group in ("algorithm", "data", "model")]
        values = {name: value for name, value in iter_fields(self.config) if name not in _KEYS_OF_LAUNCHER}
        return groups + [f"{name}={format_override(value)}" for name, value in values.items()]


def replace_in(config: TrainConfig, section: str, **changes: Any) -> TrainConfig:
    """Return a configuration with other values in one section."""
    return replace_section(config, section, dataclasses.replace(getattr(config, section), **changes))


def replace_section(config: TrainConfig, section: str, content: Any) -> TrainConfig:
    """Return a configuration with another section."""
    return dataclasses.replace(config, **{section: content})


def check_compare(config: CompareConfig) -> None:
    """Raise ``ConfigError`` before anything is loaded if a variant, named in it, cannot be run."""
    validate_train_config(config)
    if config.data.is_regression:
        raise ConfigError(
            f"data={config.data.name}: a comparison is of accuracies, and regression has none; use other data"
        )
    if len(set(config.compare.seeds)) < len(config.compare.seeds):
        raise ConfigError(f"compare.seeds={config.compare.seeds}: a seed is listed twice")
    if config.run.seed != 0:
        raise ConfigError(f"run.seed={config.run.seed}: use compare.seeds=[{config.run.seed}] for a comparison")
    if config.run.resume is not False:
        raise ConfigError(f"run.resume={config.run.resume}: a comparison resumes by itself (compare.resume)")
    parse_variants(config)


def parse_variants(config: CompareConfig) -> list[Variant]:
    """Return the variants in order; raise ``ConfigError`` if one cannot be run, or two have the same name."""
    texts = config.compare.variants
    configs = [_compose_variant(text) for text in texts]
    names = variant_names(texts)
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"compare.variants: two of them are called {name}; leave one out")
    return [Variant(name, split(text), own) for name, text, own in zip(names, texts, configs, strict=True)]


def _compose_variant(text: str) -> TrainConfig:
    try:
        overrides = split(text)
        for override in overrides:
            key = override.partition("=")[0].lstrip("+~")
            if key.startswith(_COMPARISON_KEYS):
                raise ConfigError(f"{override}: a variant cannot set this (seeds are compare.seeds)")
        config = to_dataclass(recompose_with("compare", overrides), CompareConfig)
        validate_train_config(config)
    except (ConfigError, ValueError) as error:
        raise ConfigError(f"compare.variants, {text!r}: {error}") from error
    return to_train_config(config)


def to_train_config(config: CompareConfig) -> TrainConfig:
    """Return the sections of a comparison's configuration that a training has."""
    return TrainConfig(**{field.name: getattr(config, field.name) for field in dataclasses.fields(TrainConfig)})


def resolve_variant_data(variants: list[Variant]) -> list[Variant]:
    """Return the variants with the data set that is really used; a fallback is reported once for all that share it."""
    resolved: dict[str, Any] = {}
    result = []
    for variant in variants:
        requested = repr(variant.config.data)
        if requested not in resolved:
            resolved[requested] = resolve_data(variant.config).data
        config = replace_section(variant.config, "data", resolved[requested])
        validate_train_config(config)
        result.append(dataclasses.replace(variant, config=config))
    return result


def jobs(variants: list[Variant], seeds: list[int], folder: Path) -> list[Job]:
    """Return all runs, seed by seed, so that the first pairs are complete early."""
    return [
        Job(variant.name, folder / f"{variant.name}-seed{seed}", replace_in(variant.config, "run", seed=seed))
        for seed in seeds
        for variant in variants
    ]
