"""What ``scripts/adapt.py`` refuses at once: folders are listed, no image is read. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from metalearn.config.commands_schema import AdaptConfig
from metalearn.config.run_config import load_run_config
from metalearn.config.schema import SinusoidConfig
from metalearn.config.validation import run_dir_errors
from metalearn.core.errors import ConfigError, DataError
from metalearn.data.image_folder import ImageClass, list_classes, list_images, preview_names


def check_adapt(config: AdaptConfig) -> None:
    """As ``metalearn.config.validation.validate_train_config``, for ``conf/adapt.yaml``.

    Raises:
        ConfigError: listing every fault of the keys, or that the run has no classes.
        DataError: if a folder is not laid out as it must be, naming the class or the file.
    """
    faults = run_dir_errors(config.run.dir) + _combination_faults(config) + _path_faults(config)
    if faults:
        raise ConfigError("\n".join(faults))
    trained = load_run_config(Path(config.run.dir) / "config.yaml")
    if isinstance(trained.data, SinusoidConfig):
        raise ConfigError(
            f"run.dir={config.run.dir}: this run predicts numbers (data=sinusoid) and no classes of images; in Python, "
            "metalearn.load(run).adapt(x, y).predict(x) adapts it"
        )
    support = None if config.support is None else _support(Path(config.support).expanduser())
    if config.query is not None:
        query = _query(Path(config.query).expanduser())
        if support:
            refuse_unknown(query, [one.name for one in support], config.query)


def refuse_unknown(query: Sequence[str], known: Sequence[str], folder: str) -> None:
    """Refuse classes of the query folder that were not adapted to.

    Raises:
        DataError: naming them.
    """
    if unknown := [name for name in query if name not in known]:
        raise DataError(
            f"query={folder} holds classes that are not among the {len(known)} of the support set: "
            f"{preview_names(unknown)}. "
            f"Those are {preview_names(known)}. Add examples of such a class to support, rename it, or put images "
            "whose class is not known into query itself, without folders."
        )


def _combination_faults(config: AdaptConfig) -> list[str]:
    faults = []
    if config.support is None and config.weights is None:
        faults.append("support is required: a folder with one folder a class (or weights=FILE, saved before)")
    if config.weights is None:
        return faults
    if config.support is not None:
        faults.append(f"weights={config.weights} with support={config.support}: give one; weights are adapted already")
    if config.steps is not None:
        faults.append(f"steps={config.steps} with weights={config.weights}: no steps are taken; leave one out")
    if config.query is None:
        faults.append(f"weights={config.weights} without query: there is nothing to do; give query=DIR")
    return faults


def _path_faults(config: AdaptConfig) -> list[str]:
    faults = []
    if config.weights is not None and not Path(config.weights).expanduser().is_file():
        faults.append(f"weights={config.weights}: there is no such file")
    if config.save is not None and Path(config.save).expanduser().exists():
        faults.append(f"save={config.save}: this exists, and is not overwritten; remove it, or choose another name")
    return faults


def _support(folder: Path) -> list[ImageClass]:
    classes = list_classes(folder)
    _refuse_empty(classes, folder)
    if len(classes) < 2:
        raise DataError(
            f"support={folder} holds one class ({classes[0].name}); there is nothing to tell apart with fewer than 2. "
            "It must hold one folder a class."
        )
    return classes


def _query(folder: Path) -> list[str]:
    """Names of the classes; none of images without classes."""
    if list_images(folder):
        return []
    classes = list_classes(folder)
    _refuse_empty(classes, folder)
    return [one.name for one in classes]


def _refuse_empty(classes: Sequence[ImageClass], folder: Path) -> None:
    if empty := [one.name for one in classes if not one.files]:
        raise DataError(f"{folder} holds no image in {preview_names(empty)}. Add images there, or remove such classes.")
