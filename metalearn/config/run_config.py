"""Configurations outside of the command line: in a run's folder, and what the data at hand makes of them."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from metalearn.config import schema
from metalearn.config.compose import CONF, SCHEMAS, to_dataclass
from metalearn.config.messages import GROUPS
from metalearn.config.validation import result_keys, validate_train_config
from metalearn.core.errors import ConfigError, RunError
from metalearn.data.metadata import omniglot_unavailable_reason, resolve_dataset

log = logging.getLogger(__name__)

Config = TypeVar("Config")

_ADDED_LATER = (
    "inner.snapshot_every",
    "inner.rule",
    "inner.momentum",
    "inner.betas",
    "inner.eps",
    "inner.weight_decay",
    "inner.clip_norm",
    "model.context",
    "algorithm.backend",
    "run.resume",
    "run.init_from",
    "run.checkpoint_seconds",
    "run.on_nonfinite",
    "run.precision",
    "run.cuda_graph",
    "run.memory_limit",
    "log.curvature_every",
    "log.eigenvalue_every",
)
"""Keys that the files of older runs lack; those were trained as the defaults say."""


def load_run_config(path: Path) -> schema.TrainConfig:
    """A run's configuration, from the ``config.yaml`` in its folder.

    Raises:
        ConfigError: if it does not fit the schema.
    """
    try:
        return parse_run_config(path.read_text(), path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not the configuration of a run: {error}") from error


def parse_run_config(text: str, path: Path) -> schema.TrainConfig:
    """A run's configuration as YAML, which was found in ``path``.

    Raises:
        ConfigError: if it does not fit the schema.
    """
    try:
        raw = OmegaConf.create(text)
        assert isinstance(raw, DictConfig), "it is no mapping of keys"
        assert "data" in raw, "it is empty, or not whole"
        if isinstance(raw.get("run"), DictConfig):
            raw.run.pop("accept", None)  # of older runs
        base = OmegaConf.structured(schema.TrainConfig)
        for group in ("data", "model", "algorithm"):
            base[group] = OmegaConf.structured(SCHEMAS[raw[group].name])
        for name in _ADDED_LATER:
            section, _, own = name.partition(".")
            known = {f.name for f in dataclasses.fields(OmegaConf.get_type(base[section]))}  # type: ignore[arg-type]
            if own in known and OmegaConf.select(raw, name, default="missing") == "missing":
                OmegaConf.update(raw, name, _default(name, raw))
        return _on_schema(base, raw, schema.TrainConfig)
    except (KeyError, AssertionError, YAMLError, OmegaConfBaseException, ConfigError) as error:
        raise ConfigError(f"{path} is not the configuration of a run: {error}") from error


def _default(name: str, raw: DictConfig) -> Any:
    """What a key is where nobody sets it."""
    group, _, key = name.partition(".")
    option = CONF / group / f"{raw[group].name}.yaml" if group in GROUPS else CONF / "settings.yaml"
    content = OmegaConf.load(option)
    return OmegaConf.select(content, key if group in ("data", "model") else name)


def _on_schema(base: DictConfig, raw: DictConfig, kind: type[Config]) -> Config:
    """What a YAML file holds, on the schema that it must fit."""
    merged = OmegaConf.merge(base, raw)
    assert isinstance(merged, DictConfig)
    return to_dataclass(merged, kind)


Trained = TypeVar("Trained", bound=schema.TrainConfig)


def resolve_data(config: Trained) -> Trained:
    """The configuration with the data set that is really used: its fallback where Omniglot cannot be had.

    Raises:
        ConfigError: if the task does not fit the fallback.
    """
    if config.run.init_from is not None:
        source = str(Path(config.run.init_from).expanduser().absolute())
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, init_from=source))
    data = config.data
    if isinstance(data, schema.ImagesConfig):
        place = str(Path(data.root).expanduser().absolute())
        return dataclasses.replace(config, data=dataclasses.replace(data, root=place))
    if not isinstance(data, schema.OmniglotConfig):
        return config
    name = resolve_dataset(data.name, data.root, data.fallback)
    if name == data.name:
        root = str(Path(data.root).expanduser().absolute()) if data.root else None
        return dataclasses.replace(config, data=dataclasses.replace(data, root=root))
    log.warning(
        "NO OMNIGLOT: %s. The embedded glyphs are used instead (data.fallback=glyphs); figures are not "
        "Omniglot's. METALEARN_DATA=FOLDER or data.root=FOLDER points to a copy.",
        omniglot_unavailable_reason(data.root),
    )
    raw = OmegaConf.load(CONF / "data" / f"{name}.yaml")
    assert isinstance(raw, DictConfig)
    raw.pop("defaults")
    fallback = _on_schema(OmegaConf.structured(SCHEMAS[name]), raw, schema.GlyphsConfig)
    settled = dataclasses.replace(config, data=fallback)
    validate_train_config(settled)
    return settled


def resolve_resume(config: schema.TrainConfig, run_dir: Path) -> schema.TrainConfig:
    """The configuration of a run that may go on in its folder: ``inner.engine=auto`` stays what it was settled to.

    Raises:
        RunError: if there is nothing to go on with, or if keys differ from those that it was begun with.
    """
    path = run_dir / "config.yaml"
    if config.run.resume is False or not (path.exists() or config.run.resume is True):
        return config
    if not path.exists():
        raise RunError(
            f"run.resume=true, but {run_dir} holds no run to go on with (no config.yaml). Name its folder with "
            "hydra.run.dir=PATH; run.resume=auto starts a run where there is none."
        )
    recorded = load_run_config(path)
    if config.inner.engine == "auto":
        kept = {name: getattr(recorded.inner, name) for name in ("engine", "task_chunk", "snapshot_every")}
        config = dataclasses.replace(config, inner=dataclasses.replace(config.inner, **kept))
    if changed := diff_configs(config, recorded):
        raise RunError(
            f"{run_dir} holds a run with another configuration, which would be mixed with this one:\n"
            + "\n".join(changed.values())
            + "\nGo on with the same values, or start a new run from this one's best parameters, in another folder: "
            + f"run.init_from={run_dir}."
        )
    return config


def diff_configs(wanted: schema.TrainConfig, recorded: schema.TrainConfig) -> dict[str, str]:
    """Keys of a run that have other values now, and a line for each; that it is resumed makes no difference."""
    return changed_keys(result_keys(wanted), result_keys(recorded))


def changed_keys(now: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, str]:
    """Every dotted key whose value in a folder is not the one that is asked for, and a line that says so."""
    return {
        name: f"{name}: {before.get(name)} in the folder, {now.get(name)} now"
        for name in sorted({*now, *before})
        if now.get(name) != before.get(name)
    }


def relocate_data(data: schema.DataConfig, root: str | None) -> schema.DataConfig:
    """A finished run's data set where it lies now: in ``root``, where it was, or in ``METALEARN_DATA``.

    Raises:
        ConfigError: if ``root`` is given for a data set that is not on disk.
    """
    if isinstance(data, schema.ImagesConfig):
        return dataclasses.replace(data, root=root or data.root)
    if not isinstance(data, schema.OmniglotConfig):
        if root:
            raise ConfigError(f"data.root={root}: the run was trained on {data.name}, which is embedded; leave it out")
        return data
    recorded = data.root if data.root is None or Path(data.root).is_dir() else os.environ.get("METALEARN_DATA")
    return dataclasses.replace(data, root=root or recorded or data.root, fallback=None)


def to_yaml(config: object) -> str:
    """A configuration object as YAML, every key resolved."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
