"""Names of output folders and of a comparison's variants, and the files that folders hold. Imports no torch."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import shlex
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from metalearn.config.run_config import parse_record
from metalearn.config.yaml_limits import read_yaml
from metalearn.core.errors import ConfigError, RunError
from metalearn.core.paths import expand_home
from metalearn.data.metadata import resolve_dataset
from metalearn.pretrained.model_file import find_run
from metalearn.training.run_folder import COMPARISON_FILE, TRAINING_FILES, is_locked

RESULTS_FILE = "results.json"
"""The file that a comparison writes when all of its runs have ended."""
RUN_FILES = (*TRAINING_FILES, "benchmark.json", "lessons.json", "verify.json", COMPARISON_FILE)
"""A folder with one of these holds the output of a command, and no other command writes there."""

_MAY_DIFFER = {"compare.jobs", "compare.resume", "data.root"}
_LONGEST = 100  # characters of a name; file systems allow 255 bytes


def split(variant: str) -> list[str]:
    """Split a variant into its overrides, as a shell would."""
    return shlex.split(variant)


def variant_names(variants: Sequence[str]) -> list[str]:
    """Return a name for each variant, as ``first_order`` or ``engine-adjoint,steps-5``.

    Where two would have the same name, as ``inner.lr=0.1`` and ``outer.lr=0.1``, their keys are spelt out.
    """
    short = [_name(variant, whole_keys=False) for variant in variants]
    return [_name(variant, whole_keys=short.count(name) > 1) for variant, name in zip(variants, short, strict=True)]


def _name(variant: str, *, whole_keys: bool) -> str:
    words = []
    for override in split(variant):
        key, _, value = override.partition("=")
        if key == "inner.second_order" and value.lower() in ("true", "false"):
            words.append("second_order" if value.lower() == "true" else "first_order")
        else:
            words.append(f"{key if whole_keys else key.rpartition('.')[2]}-{value}")
    return _cut(re.sub(r"[^A-Za-z0-9_.,+-]", "_", ",".join(words)) or "base")


def _cut(name: str) -> str:
    """Return a long name's beginning, with a digest of all of it."""
    if len(name) <= _LONGEST:
        return name
    return f"{name[: _LONGEST - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def comparison_dir_name(parent: Path, config: dict[str, Any], moment: str) -> str:
    """Return the folder of a comparison: an unfinished one of the same configuration, or a new one.

    Args:
        parent: of all comparisons on the same tasks.
        config: resolved.
        moment: makes a new folder's name unique.
    """
    if config["compare"]["resume"]:
        found = sorted(path.parent for path in parent.glob(f"*/{COMPARISON_FILE}"))
        for folder in reversed(found):
            if (
                is_unfinished(folder)
                and not is_locked(folder)
                and comparison_key(read_record(folder)) == comparison_key(config)
            ):
                return folder.name
    return f"{_cut('-vs-'.join(variant_names(config['compare']['variants'])))}-{moment}"


def running_twin(folder: Path, config: dict[str, Any]) -> Path | None:
    """Return another folder beside this one in which the same comparison is running."""
    for record in folder.parent.glob(f"*/{COMPARISON_FILE}"):
        other = record.parent
        if other != folder and is_locked(other) and comparison_key(read_record(other)) == comparison_key(config):
            return other
    return None


def is_unfinished(folder: Path) -> bool:
    """Return whether a run of a comparison is missing or failed, as far as is known."""
    try:
        return json.loads((folder / RESULTS_FILE).read_text())["complete"] is not True
    except (OSError, ValueError, KeyError):
        return True


def read_record(folder: Path) -> dict[str, Any]:
    """Read the configuration in a comparison's folder; empty if it cannot be read."""
    try:
        return parse_record(read_yaml(folder / COMPARISON_FILE))
    except (OSError, UnicodeDecodeError, ConfigError):
        return {}


def comparison_key(config: dict[str, Any]) -> dict[str, Any]:
    """Return the values that make it the same comparison, by their dotted keys."""
    return {
        key: value
        for section, values in config.items()
        for name, value in values.items()
        if (key := f"{section}.{name}") not in _MAY_DIFFER
    }


@functools.cache
def register_resolvers() -> None:
    """Tell Hydra how runs and comparisons are named."""
    OmegaConf.register_new_resolver("run_name", _run_name)
    OmegaConf.register_new_resolver("comparison_name", _comparison_name)
    OmegaConf.register_new_resolver("evaluations_dir", _evaluations_dir)
    OmegaConf.register_new_resolver("moment", timestamp)


def timestamp() -> str:
    """Return the time of day to the microsecond, so that runs that start together have different folders."""
    return datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")


def _run_name(*, _root_: Any) -> str:
    order = "second_order" if _root_.inner.second_order else "first_order"
    return f"{_task_name(_root_)}/{_label(_root_.algorithm)}-{order}-seed{_root_.run.seed}-{timestamp()}"


def _label(option: Any) -> str:
    return str(option.target).partition(":")[2] if option.name == "custom" else str(option.name)


def _task_name(root: Any) -> str:
    data, task = root.data, root.task
    if data.name == "custom":
        name, is_regression = _label(data), data.regression
    else:
        name = resolve_dataset(data.name, data.get("root"), data.get("fallback"))
        is_regression = name == "sinusoid"
    return f"{name}-{task.shots}s" if is_regression else f"{name}-{task.ways}w{task.shots}s"


def _comparison_name(*, _root_: Any) -> str:
    tasks = _task_name(_root_)
    sections = {str(name): OmegaConf.to_container(_root_[name], resolve=True) for name in _root_ if name != "hydra"}
    return f"{tasks}/{comparison_dir_name(Path('outputs/comparisons') / tasks, sections, timestamp())}"


def run_dir_errors(run: str) -> list[str]:
    """Return what is wrong with ``run.dir`` as a run's folder, a model file or the name of a shipped model."""
    if (expand_home(run) / COMPARISON_FILE).is_file():
        return [f"run.dir={run}: a comparison's folder; name one of the runs in it"]
    try:
        find_run(run)
    except RunError as error:
        return [f"run.dir={error}"]
    return []


def _evaluations_dir(run: str) -> str:
    """Return the folder of a run's tests: in the run's own, or below outputs/ for one that is a file."""
    path = expand_home(run)
    return f"{path}/evaluations" if (path / "config.yaml").is_file() else f"outputs/evaluations/{path.stem}"
