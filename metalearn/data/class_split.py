"""Divide classes, by their names, into training, validation and test: by fractions, or as a list says. No torch."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metalearn.core.errors import DataError
from metalearn.core.paths import expand_home
from metalearn.core.text import plural, preview_names

log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")

_FOLDER = Path(__file__).parent / "class_splits"
PUBLISHED = tuple(sorted(path.stem for path in _FOLDER.glob("*.json")))
"""``cifar_fs``: 64, 16 and 20 classes of CIFAR-100 (Bertinetto et al. 2019, arXiv:1805.08136); ``mini_imagenet``: as
many of ImageNet, by WordNet id (Ravi & Larochelle 2017)."""

ClassSplit = str | Mapping[str, Sequence[str]] | None
"""One of ``PUBLISHED``, a JSON file, or what that holds: names of classes by split; ``None``: by fractions."""

_FORM = '{"train": [NAME, ...], "validation": [NAME, ...], "test": [NAME, ...]}'


def split_classes(
    names: Sequence[str], source: str, *, fractions: Sequence[float], seed: int, class_split: ClassSplit = None
) -> dict[str, list[str]]:
    """Divide names into ``"train"``, ``"validation"`` and ``"test"``, each sorted.

    Args:
        names: of all classes.
        source: of the names, for messages, ``data.root=PHOTOS``.
        fractions: three, that add up to 1. The split then depends only on the names and the seed.
        seed: of the split by fractions.
        class_split: as ``read_class_split`` takes it, in place of fractions.

    Raises:
        DataError: if the file cannot be used, or names a class that there is not.
        ValueError: if the fractions are not three that add up to 1.
    """
    if class_split is None:
        return _split_by_hash(names, fractions, seed)
    splits = read_class_split(class_split)
    if absent := sorted({name for chosen in splits.values() for name in chosen} - set(names)):
        raise DataError(
            f"{_key(class_split)}: {source} lacks {len(absent)} of its "
            f"{plural(sum(map(len, splits.values())), 'class', 'classes')}: {preview_names(absent)}. The "
            f"{plural(len(names), 'class', 'classes')} there are {preview_names(sorted(names))}"
        )
    return splits


def read_class_split(class_split: str | Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return the names of the classes for training, validation and test, each sorted.

    Args:
        class_split: one of ``PUBLISHED``, a JSON file, or what it holds.

    Raises:
        DataError: if there is no such file, it has another form, or it names a class twice.
    """
    what = _key(class_split)
    content: Any = _read_json(class_split) if isinstance(class_split, str) else class_split
    if not isinstance(content, Mapping) or set(content) != set(SPLITS) or not all(map(_is_names, content.values())):
        raise DataError(f"{what}: this must hold {_FORM}, with one name or more in each")
    owners: dict[str, list[str]] = {}
    for split in SPLITS:
        for name in content[split]:
            owners.setdefault(name, []).append(split)
    if twice := [f"{name} ({' and '.join(places)})" for name, places in sorted(owners.items()) if len(places) > 1]:
        raise DataError(f"{what}: {plural(len(twice), 'class is', 'classes are')} named twice: {preview_names(twice)}")
    return {split: sorted(content[split]) for split in SPLITS}


def _key(class_split: ClassSplit) -> str:
    return f"data.class_split={class_split}" if isinstance(class_split, str) else "data.class_split"


def _read_json(class_split: str) -> Any:
    path = _FOLDER / f"{class_split}.json" if class_split in PUBLISHED else expand_home(class_split)
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
    except FileNotFoundError:
        near = difflib.get_close_matches(class_split.lower().replace("-", "_"), PUBLISHED, n=1)
        meant = f"Did you mean {near[0]}? " if near else ""
        raise DataError(
            f"{_key(class_split)}: there is no such file. {meant}The published splits are {', '.join(PUBLISHED)}; a "
            f"FILE of your own holds {_FORM}"
        ) from None
    except (OSError, RuntimeError, ValueError, RecursionError) as error:  # a folder, an unknown user's home, no JSON
        raise DataError(f"{_key(class_split)}: this cannot be read ({error}); it must hold JSON, {_FORM}") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def log_classes_left_out(names: Sequence[str], splits: Mapping[str, Sequence[str]], class_split: ClassSplit) -> None:
    """Log in one line which of the classes that there are a class split does not name."""
    if left_out := sorted(set(names).difference(*splits.values())):
        count = plural(len(left_out), "class", "classes")
        log.info("%s leaves out %s: %s", _key(class_split), count, preview_names(left_out))


def check_split_sizes(
    splits: Mapping[str, Sequence[tuple[str, int]]], source: str, *, ways: int, needed: Mapping[str, int]
) -> None:
    """Check that every split has ``ways`` classes, each with as many images as the split needs (K + Q).

    Raises ``DataError``, which lists every split with too few classes and every class with too few images; ``source``
    is what it calls them, ``data.root=PHOTOS``.
    """
    errors = []
    for split, classes in splits.items():
        if len(classes) < ways:
            names = f" ({preview_names([name for name, _ in classes])})" if classes else ""
            errors.append(
                f"{source}: {split} has {plural(len(classes), 'class', 'classes')}{names}, and a task takes "
                f"task.ways={ways}; lower task.ways, add classes, or choose data.fractions or data.class_split that "
                "give it more"
            )
        if small := [f"{name}: {count}" for name, count in classes if count < needed[split]]:
            errors.append(
                f"{source}: a task takes {needed[split]} images of each class for {split}, as shots and "
                f"queries, and {plural(len(small), 'class has', 'classes have')} fewer: {preview_names(small)}. Add "
                f"images, remove such classes, or lower task.shots or {'task' if split == 'train' else 'eval'}.queries"
            )
    if errors:
        raise DataError("\n".join(errors))


def _is_names(value: object) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(name, str) for name in value)


def _split_by_hash(names: Sequence[str], fractions: Sequence[float], seed: int) -> dict[str, list[str]]:
    """Split by the hash of seed and name, so that a class added later changes little."""
    if len(fractions) != len(SPLITS) or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(
            f"fractions={list(fractions)}: give three fractions that add up to 1, of classes for training, validation "
            "and test."
        )
    order = sorted(names, key=lambda name: hashlib.sha256(b"%d %s" % (seed, os.fsencode(name))).digest())
    validation, test = (round(share * len(names)) for share in fractions[1:])
    train = len(names) - validation - test
    parts = order[:train], order[train : train + validation], order[train + validation :]
    return {split: sorted(part) for split, part in zip(SPLITS, parts, strict=True)}
