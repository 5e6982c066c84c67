"""Check the configuration of ``metalearn adapt``: folders are listed, no image is read. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from metalearn.commands.output_folders import run_dir_errors
from metalearn.config.commands_schema import AdaptConfig
from metalearn.config.run_config import load_trusted_config
from metalearn.core.errors import ConfigError, DataError
from metalearn.core.paths import expand_home
from metalearn.core.text import preview_names
from metalearn.data.image_folder import check_classes_hold_images, list_classes, list_images, why_no_folder


def check_adapt(config: AdaptConfig) -> None:
    """Check the keys, the run, and the folders of images.

    Raises:
        ConfigError: listing every invalid key, or if the run is a regression.
        DataError: if a folder's layout is invalid, naming the class or the file.
    """
    if errors := run_dir_errors(config.run.dir) + _key_errors(config):
        raise ConfigError("\n".join(errors))
    trained = load_trusted_config(config.run.dir, trust_code=config.run.trust_code)
    if trained.data.is_regression:
        raise ConfigError(
            f"run.dir={config.run.dir}: this run predicts numbers (data={trained.data.name}), not classes of images; "
            "adapt it in Python with metalearn.load(run).adapt(x, y).predict(x)"
        )
    support = None
    if config.support is not None:
        folder = _folder("support", config.support)
        support = _class_names(folder)
        if len(support) < 2:
            raise DataError(
                f"support={folder} holds one class ({support[0]}); there is nothing to tell apart with fewer than 2. "
                "It must hold one folder a class."
            )
    if config.query is not None:
        folder = _folder("query", config.query)
        is_flat = bool(list_images(folder))  # images without classes
        query = [] if is_flat else _class_names(folder)
        if support:
            check_known_classes(query, support, config.query)


def _folder(key: str, value: str) -> Path:
    folder = expand_home(value)
    if not folder.is_dir():
        raise DataError(f"{key}={value}: {why_no_folder(folder)}")
    return folder


def check_known_classes(query: Sequence[str], known: Sequence[str], folder: str) -> None:
    """Raise ``DataError``, naming the classes, if the query folder has classes that were not adapted to."""
    if unknown := [name for name in query if name not in known]:
        raise DataError(
            f"query={folder} holds classes that are not among the {len(known)} of the support set: "
            f"{preview_names(unknown)}. "
            f"Those are {preview_names(known)}. Add examples of such a class to support, rename it, or put images "
            "of unknown class into query itself, without folders."
        )


def _key_errors(config: AdaptConfig) -> list[str]:
    support, weights, steps, save = config.support, config.weights, config.steps, config.save
    if support is None and weights is None:
        errors = ["support is required: a folder with one folder a class (or weights=FILE, saved before)"]
    elif weights is None:
        errors = []
    else:
        checks = (
            (support is not None, f" with support={support}: give one; weights are adapted already"),
            (steps is not None, f" with steps={steps}: no steps are taken; leave one out"),
            (config.query is None, " without query: there is nothing to do; give query=DIR"),
            (not expand_home(weights).is_file(), ": there is no such file"),
        )
        errors = [f"weights={weights}{message}" for is_wrong, message in checks if is_wrong]
    if save is not None and expand_home(save).exists():
        errors.append(f"save={save}: this exists, and is not overwritten; remove it, or choose another name")
    return errors


def _class_names(folder: Path) -> list[str]:
    classes = list_classes(folder)
    check_classes_hold_images(folder, classes)
    if empty := [one.label for one in classes if not one.files]:
        raise DataError(f"{folder} holds no image in {preview_names(empty)}. Add images there, or remove such classes.")
    return [one.name for one in classes]
