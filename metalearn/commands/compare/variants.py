"""The variants of a comparison: one configuration each, checked before anything is trained.

A variant's overrides count as if they stood last on the command line, so that what depends on them (``eval.queries``
on ``task.shots``) follows. A run is then ``scripts/train.py`` with every key spelt out.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metalearn.config.commands_schema import CompareConfig
from metalearn.config.compose import CONF, to_dataclass
from metalearn.config.output_names import split, variant_names
from metalearn.config.overrides import recompose_with
from metalearn.config.run_config import resolve_data
from metalearn.config.schema import SinusoidConfig, TrainConfig, iter_fields
from metalearn.config.validation import validate_train_config
from metalearn.core.errors import ConfigError

TRAIN = CONF.parent / "scripts" / "train.py"
_NOT_A_VARIANTS = ("run.seed", "run.resume", "compare", "hydra")


@dataclass(frozen=True)
class Variant:
    """What is compared with others.

    Args:
        name: for folders and legends.
        overrides: as they were written.
        config: of its training, with the first seed.
    """

    name: str
    overrides: list[str]
    config: TrainConfig


@dataclass(frozen=True)
class Job:
    """One run of a comparison.

    Args:
        variant: its name.
        folder: where it goes.
        config: its whole configuration.
    """

    variant: str
    folder: Path
    config: TrainConfig

    @property
    def overrides(self) -> list[str]:
        """Every key of the configuration, for ``scripts/train.py``; without its seed."""
        config = self.config
        groups = [f"{group}={getattr(config, group).name}" for group in ("algorithm", "data", "model")]
        keys = [f"{name}={format_override(value)}" for name, value in iter_fields(config) if name not in _GIVEN_APART]
        return groups + keys


_GIVEN_APART = ("run.seed", "run.resume")


def check_compare(config: CompareConfig) -> None:
    """Refuse a comparison of which a variant cannot be run, before anything is loaded.

    Raises:
        ConfigError: naming the variant.
    """
    validate_train_config(config)
    if isinstance(config.data, SinusoidConfig):
        raise ConfigError("data=sinusoid: a comparison is of accuracies, and regression has none; take other data")
    if len(set(config.compare.seeds)) < len(config.compare.seeds):
        raise ConfigError(f"compare.seeds={config.compare.seeds}: a seed stands there twice")
    if config.run.seed != 0:
        raise ConfigError(f"run.seed={config.run.seed}: a comparison has compare.seeds=[{config.run.seed}] instead")
    if config.run.resume is not False:
        raise ConfigError(f"run.resume={config.run.resume}: a comparison goes on by itself (compare.resume)")
    parse_variants(config)


def parse_variants(config: CompareConfig) -> list[Variant]:
    """The variants, in the order of the configuration.

    Raises:
        ConfigError: if one cannot be composed or run, or two have the same name.
    """
    texts = config.compare.variants
    found = [_variant(text) for text in texts]
    names = variant_names(texts)
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"compare.variants: two of them are called {name}; leave one out")
    return [dataclasses.replace(variant, name=name) for variant, name in zip(found, names, strict=True)]


def base_variant(config: CompareConfig) -> Variant:
    """What all variants start from."""
    return Variant("shared", [], to_train_config(config))


def _variant(text: str) -> Variant:
    try:
        overrides = split(text)
        for override in overrides:
            key = override.partition("=")[0].lstrip("+~")
            if key.startswith(_NOT_A_VARIANTS):
                raise ConfigError(f"{override}: this holds for the whole comparison (seeds are compare.seeds)")
        config = to_dataclass(recompose_with("compare", overrides), CompareConfig)
        validate_train_config(config)
    except (ConfigError, ValueError) as error:
        raise ConfigError(f"compare.variants, {text!r}: {error}") from error
    return Variant(text, overrides, to_train_config(config))


def to_train_config(config: CompareConfig) -> TrainConfig:
    """The part of a comparison's configuration that a training has."""
    sections = {f.name: getattr(config, f.name) for f in dataclasses.fields(TrainConfig)}
    return TrainConfig(**sections)


def resolve_variant_data(variants: list[Variant]) -> list[Variant]:
    """The variants with the data set that is really used; said once for all that share it."""
    seen: dict[str, TrainConfig] = {}
    result = []
    for variant in variants:
        data = repr(variant.config.data)
        if data not in seen:
            seen[data] = resolve_data(variant.config)
        config = dataclasses.replace(variant.config, data=seen[data].data)
        validate_train_config(config)
        result.append(dataclasses.replace(variant, config=config))
    return result


def jobs(variants: list[Variant], seeds: list[int], folder: Path) -> list[Job]:
    """All runs, seed by seed, so that the first pairs are complete early."""
    return [
        Job(
            variant.name,
            folder / f"{variant.name}-seed{seed}",
            dataclasses.replace(variant.config, run=dataclasses.replace(variant.config.run, seed=seed)),
        )
        for seed in seeds
        for variant in variants
    ]


def format_override(value: Any) -> str:
    """A value in Hydra's grammar."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(format_override(v) for v in value)}]"
    if isinstance(value, str):
        quoted = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), value, count=0)
        return f"'{quoted}'"
    return repr(value)
