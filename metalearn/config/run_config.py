"""Load the configuration of an existing run; refuse to resume with another one; resolve the data set."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar, get_args

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from metalearn.config.compose import CONF
from metalearn.config.former_keys import drop_removed_keys, rename_keys
from metalearn.config.key_types import LATE
from metalearn.config.messages import GROUPS, hints, section_class
from metalearn.config.options import (
    AnyData,
    CustomDataConfig,
    GlyphsConfig,
    ImagesConfig,
    OmniglotConfig,
    TorchvisionConfig,
)
from metalearn.config.schema import TrainConfig, result_keys
from metalearn.config.validation import from_dict, validate_train_config
from metalearn.config.yaml_limits import check_yaml, read_yaml
from metalearn.core.errors import ConfigError, RunError
from metalearn.core.paths import expand_home
from metalearn.core.quoting import format_assignment, quote_word
from metalearn.core.text import cut, preview_names
from metalearn.data.class_split import PUBLISHED, read_class_split
from metalearn.data.metadata import omniglot_unavailable_reason, resolve_dataset
from metalearn.pretrained.model_file import find_run, pretrained_models, read_record

log = logging.getLogger(__name__)

_MAX_KEYS = 100
"""More than any section has."""

Trained = TypeVar("Trained", bound=TrainConfig)


def load_run_config(path: Path) -> TrainConfig:
    """Load a run's configuration from the ``config.yaml`` in its folder.

    Raises:
        ConfigError: if it does not fit the schema.
    """
    try:
        return parse_run_config(read_yaml(path), path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not the configuration of a run: {error}") from error


def load_trusted_config(run: str | Path, *, trust_code: bool, how: str = "run.trust_code=true") -> TrainConfig:
    """Load the configuration of a run whose model will be built.

    Args:
        run: its folder, a model file, or the name of a shipped model.
        trust_code: whether the user allows to run code that it names.
        how: to allow it, for the message.

    Raises:
        ConfigError: if it does not fit the schema, or names code that may not be run.
        RunError: if there is no such run, or a model file is damaged.
    """
    found = find_run(run)
    path = found if found.is_file() else found / "config.yaml"
    config = parse_run_config(read_record(found).config_yaml, found) if found.is_file() else load_run_config(path)
    check_trusted(config, path, trust_code=trust_code, how=how)
    return config


def check_trusted(config: TrainConfig, source: object, *, trust_code: bool, how: str) -> None:
    """Check that the user allows to run code that a configuration from a run's folder names.

    Raises:
        ConfigError: naming the code, where it is named, and how to allow it.
    """
    if (targets := config.targets()) and not trust_code:
        options = {name: repr(value) for name, value in result_keys(config).items() if "options" in name and value}
        named = cut(", ".join(f"{key}={value}" for key, value in {**targets, **options}.items()))
        raise ConfigError(
            f"{source} names code to run: {named}. Whoever wrote that file chose it. If you trust what has this name "
            f"on this machine, give {how}"
        )


def parse_run_config(text: str, path: Path) -> TrainConfig:
    """Parse the YAML text of a run's configuration, which was found in ``path``.

    Raises:
        ConfigError: if it does not fit the schema.
    """
    try:
        return from_dict(parse_record(text), TrainConfig, {})
    except (ConfigError, ValueError) as error:  # the latter, of an integer of too many digits to print
        raise ConfigError(f"{path} is not the configuration of a run: {cut(str(error))}") from error


def parse_record(text: str) -> dict[str, Any]:
    """Parse what a run or comparison of this or an earlier release recorded of its configuration.

    Former keys have their present names. Keys that came later (``LATE``) have their defaults, as that run was trained.

    Raises:
        ConfigError: if it is no YAML, not made of sections, or larger than a configuration.
    """
    try:
        check_yaml(text)
        plain: Any = OmegaConf.to_container(OmegaConf.create(text), resolve=False)  # ${...} in it is text
    except (AssertionError, AttributeError, ValueError, YAMLError, OmegaConfBaseException, RecursionError) as error:
        raise ConfigError(str(error)) from error
    if not isinstance(plain, dict) or "data" not in plain or not all(isinstance(n, dict) for n in plain.values()):
        raise ConfigError("it is empty, or not whole")
    for names in (plain, *plain.values()):
        if len(names) > _MAX_KEYS:
            raise ConfigError(f"it has {len(names):,} keys in one place: {preview_names([*map(str, names)])}")
        if odd := [name for name in names if not isinstance(name, str)]:
            raise ConfigError(f"{odd[0]!r} is the name of a key, and no text")
    rename_keys(plain, warn=False)
    drop_removed_keys(plain)
    return {section: {**_late_defaults(section, node), **node} for section, node in plain.items()}


def _late_defaults(section: str, node: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults of the keys of a section that came later and that it lacks."""
    kind = section_class(TrainConfig, section, node.get("name"))
    late = [key for key, hint in hints(kind).items() if LATE in get_args(hint) and key not in node] if kind else []
    if not late:
        return {}
    content = _load(f"{section}/{node['name']}" if section in GROUPS else "settings")
    return {key: content.get(section, content)[key] for key in late}


@functools.cache
def _load(name: str) -> Any:
    return OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"), resolve=False)


def resolve_data(config: Trained) -> Trained:
    """Return the configuration with the data set that is really used: its fallback where Omniglot is not available.

    Raises:
        ConfigError: if the task does not fit the fallback.
    """
    source = config.run.init_from
    if source is not None and (Path(source).exists() or source not in pretrained_models()):
        source = _absolute(source)
        config = replace(config, run=replace(config.run, init_from=source))
    data = config.data
    if isinstance(data, (ImagesConfig, TorchvisionConfig)):
        if isinstance(data.class_split, str) and data.class_split not in PUBLISHED:  # the run keeps the names
            data = replace(data, class_split=read_class_split(data.class_split))
        return replace(config, data=_with_root(data, _absolute))
    if not isinstance(data, OmniglotConfig):
        return config
    name = resolve_dataset(data.name, data.root, data.fallback)
    if name == data.name:
        return replace(config, data=replace(data, root=data.root and _absolute(data.root)))
    log.warning(
        "NO OMNIGLOT: %s. The embedded glyphs are used instead (data.fallback=glyphs); results are not "
        "Omniglot's. METALEARN_DATA=FOLDER or data.root=FOLDER points to a copy.",
        omniglot_unavailable_reason(data.root),
    )
    resolved = replace(config, data=GlyphsConfig(**_load(f"data/{name}")))
    validate_train_config(resolved)
    return resolved


def _absolute(path: str) -> str:
    return str(expand_home(path).absolute())


def _with_root(data: ImagesConfig | TorchvisionConfig, new: Callable[[str], str]) -> ImagesConfig | TorchvisionConfig:
    return replace(data, root=new(data.root)) if data.root else data


def resolve_resume(config: TrainConfig, run_dir: Path) -> TrainConfig:
    """Return the configuration of a run that may be resumed in its folder, with the engine that ``auto`` chose.

    Raises:
        RunError: if there is nothing to resume, or if keys differ from those that it was started with.
    """
    path = run_dir / "config.yaml"
    if config.run.resume is False or not (path.exists() or config.run.resume is True):
        return config
    if not path.exists():
        raise RunError(
            f"run.resume=true, but {run_dir} holds no run to resume (no config.yaml). Name its folder with "
            "hydra.run.dir=PATH; run.resume=auto starts a run where there is none."
        )
    recorded = load_run_config(path)
    if config.inner.engine == "auto":
        chosen = {name: getattr(recorded.inner, name) for name in ("engine", "task_chunk", "checkpoint_every")}
        config = replace(config, inner=replace(config.inner, **chosen))
    if changed := changed_keys(result_keys(config), result_keys(recorded)):
        raise RunError(
            f"{run_dir} holds a run with another configuration, which would be mixed with this one:\n"
            + "\n".join(changed.values())
            + "\nResume with the same values, choose another folder, or start a new run from this one's parameters, "
            f"with another hydra.run.dir and\n  {quote_word(format_assignment('run.init_from', run_dir))}"
        )
    return config


def changed_keys(now: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, str]:
    """Return every dotted key whose value in a folder is not the present one, with a line for each."""
    return {
        name: f"{name}: {before.get(name)} in the folder, {now.get(name)} now"
        for name in sorted({*now, *before})
        if now.get(name) != before.get(name)
    }


def relocate_data(data: AnyData, root: str | None, *, rotate_test: bool | None = None) -> AnyData:
    """Return a finished run's data set where it lies now: in ``root``, where it was, or in ``METALEARN_DATA``.

    ``rotate_test`` replaces the run's own, unless it is ``None``.

    Raises:
        ConfigError: if ``root`` is given for a data set that is not on disk, or ``rotate_test`` for one that is not
            Omniglot.
    """
    if rotate_test is not None:
        if not isinstance(data, OmniglotConfig):
            raise ConfigError(f"data.rotate_test is of Omniglot, and the run was trained on {data.name}; leave it out")
        data = replace(data, rotate_test=rotate_test)
    if isinstance(data, (ImagesConfig, TorchvisionConfig)):
        return replace(data, root=root) if root else data
    if not isinstance(data, OmniglotConfig):
        if root:
            kind = "your own data" if isinstance(data, CustomDataConfig) else "embedded"
            raise ConfigError(f"data.root={root}: the run was trained on {data.name}, which is {kind}; leave it out")
        return data
    recorded = data.root if data.root and Path(data.root).is_dir() else os.environ.get("METALEARN_DATA")
    return replace(data, root=root or recorded or data.root, fallback=None)


def without_paths(config: TrainConfig) -> TrainConfig:
    """Return the configuration without the paths of this machine, as a model file has it."""
    config = replace(config, run=replace(config.run, init_from=None))
    if isinstance(config.data, OmniglotConfig):
        return replace(config, data=replace(config.data, root=None))
    if isinstance(config.data, (ImagesConfig, TorchvisionConfig)):
        return replace(config, data=_with_root(config.data, lambda root: Path(root).name))
    return config


def to_yaml(config: Any) -> str:
    """Format a configuration object as YAML, every key resolved.

    Raises:
        ConfigError: if it is so large that it would not be read again.
    """
    text = OmegaConf.to_yaml(asdict(config))
    try:
        check_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"the configuration is too large: {error}; shorten data.class_split or options") from error
    return text
