"""A user's folder of images, one sub-folder a class, as it is listed; no file is opened. Imports no torch.

Configurations are checked against this listing, so that a folder that is too small for the task is refused at once.

    root/train/CLASS/*.jpg                or    root/CLASS/*.jpg
    root/val/CLASS/*.jpg   (validation, valid)  (classes are split by fractions)
    root/test/CLASS/*.jpg
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from metalearn.core.errors import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""What is taken for an image, in upper case too: torchvision's list; a test holds the two equal."""

SPLITS = ("train", "validation", "test")
SHOWN = 5
"""Names in a message, before the rest is only counted."""

_FOLDERS = {"train": ("train",), "validation": ("val", "valid", "validation"), "test": ("test",)}
_LEFT_BY_ARCHIVERS = "__MACOSX"


class ImageClass(NamedTuple):
    """One class: the name of its folder, and its images in sorted order."""

    name: str
    files: list[Path]


Splits = dict[str, list[ImageClass]]
"""Classes of ``"train"``, ``"validation"`` and ``"test"``, sorted by name."""


def list_splits(root: str | Path, *, fractions: Sequence[float] = (0.6, 0.2, 0.2), seed: int = 0) -> Splits:
    """The classes of every split, by folder where there is a ``train/``, else by fractions.

    A split by fractions is a function of the classes' names and the seed alone.

    Args:
        root: a folder as above. Hidden files and folders are passed over, and so is in it what is no image.
        fractions: shares of the classes for training, validation and test, where no folders say so.
        seed: of the order in which classes are dealt out by fractions.

    Raises:
        DataError: if there is no such folder, no image in it, an image outside of a class, or a split is missing.
        ValueError: if the fractions are not three that add up to 1.
    """
    folder = Path(root).expanduser()
    try:
        folders = _split_folders(folder)
        if folders:
            return {split: list_classes(place) for split, place in folders.items()}
        return _dealt(list_classes(folder), fractions, seed)
    except (OSError, RuntimeError) as error:  # closed to us, a name too long, the home of a user who is not
        raise DataError(f"{root}: this folder cannot be looked into ({str(error).rstrip('.')})") from error


def list_classes(folder: Path) -> list[ImageClass]:
    """The sub-folders of a folder, each with the images in it and below it.

    Raises:
        DataError: if there is no such folder, no sub-folder with an image, or an image outside of the sub-folders.
    """
    names, loose = _entries(folder)
    if names and loose:
        raise DataError(
            f"{folder} holds classes ({preview_names(names)}) and, beside them, images "
            f"({preview_names([p.name for p in loose])}), "
            "which belong to no class. Put them into the folder of their class, or remove them."
        )
    classes = [ImageClass(name, _images_below(folder / name, {_identity(folder)})) for name in names]
    if not any(one.files for one in classes):
        found = f"{len(loose)} images but no folders of classes" if loose else "no images"
        raise DataError(
            f"{folder} holds {found}. It must hold one folder a class, with images in it ({', '.join(EXTENSIONS)})."
        )
    return classes


def list_images(folder: Path) -> list[Path] | None:
    """The images of a folder without classes, sorted; ``None`` if it has sub-folders or no image."""
    names, loose = _entries(folder)
    return loose if loose and not names else None


def check_split_sizes(
    splits: Mapping[str, Sequence[tuple[str, int]]], root: str | Path, *, ways: int, needed: Mapping[str, int]
) -> None:
    """Refuse splits that a task does not fit into.

    Args:
        splits: of each split, every class's name and number of images.
        root: for the message.
        ways: N, classes per task.
        needed: K + Q in each split.

    Raises:
        DataError: naming the split and its classes, or the class and its images; every fault on a line of its own.
    """
    faults = []
    for split, classes in splits.items():
        if len(classes) < ways:
            names = f" ({preview_names([name for name, _ in classes])})" if classes else ""
            faults.append(
                f"data.root={root}: {split} has {len(classes)} classes{names}, and a task takes task.ways={ways}; "
                "lower task.ways, add classes, or choose data.fractions that give it more"
            )
        if small := [f"{name}: {count}" for name, count in classes if count < needed[split]]:
            faults.append(
                f"data.root={root}: of the classes for {split}, {len(small)} have fewer than {needed[split]} images, "
                f"which a task takes of each class as shots and queries: "
                f"{preview_names(small)}. Add images, remove the class, "
                f"or lower task.shots or {'task' if split == 'train' else 'eval'}.queries"
            )
    if faults:
        raise DataError("\n".join(faults))


def preview_names(names: Sequence[str]) -> str:
    """The first few, and how many more."""
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def in_several(splits: Splits) -> list[str]:
    """Names of classes that are in more than one split."""
    names = [one.name for classes in splits.values() for one in classes]
    return sorted({name for name in names if names.count(name) > 1})


def _split_folders(root: Path) -> dict[str, Path] | None:
    """The folder of each split, or ``None`` if the root holds classes."""
    names, _ = _entries(root)
    found = {split: [name for name in names if name in choices] for split, choices in _FOLDERS.items()}
    others = [name for name in names if not any(name in choices for choices in _FOLDERS.values())]
    if not found["train"] or (others and not (found["validation"] or found["test"])):  # a class of trains, say
        return None
    for split, folders in found.items():
        if len(folders) != 1:
            what = f"more than one folder for {split} ({', '.join(folders)})" if folders else f"none for {split}"
            raise DataError(
                f"{root} holds a folder train, so it is split by folders, but it has {what}. It must hold train, one "
                "of val, valid and validation, and test; or classes alone, to be split by data.fractions."
            )
    if others:
        raise DataError(
            f"{root} is split by folders (train, {found['validation'][0]}, test) and holds others beside them: "
            f"{preview_names(others)}. Move these into a split, or remove them."
        )
    return {split: root / folders[0] for split, folders in found.items()}


def _dealt(classes: list[ImageClass], fractions: Sequence[float], seed: int) -> Splits:
    """Classes dealt out by the hash of seed and name: what is added later changes little."""
    if len(fractions) != len(SPLITS) or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(
            f"fractions={list(fractions)}: give three shares that add up to 1, of classes for training, validation "
            "and test."
        )
    order = sorted(classes, key=lambda one: hashlib.sha256(b"%d %s" % (seed, os.fsencode(one.name))).digest())
    validation, test = (round(share * len(classes)) for share in fractions[1:])
    train = len(classes) - validation - test
    parts = order[:train], order[train : train + validation], order[train + validation :]
    return {split: sorted(part) for split, part in zip(SPLITS, parts, strict=True)}


def _entries(folder: Path) -> tuple[list[str], list[Path]]:
    """Names of the sub-folders, and the images that lie in it, both sorted."""
    if not folder.is_dir():
        raise DataError(
            f"{folder}: this is a file; name its folder" if folder.is_file() else f"{folder}: there is no such folder"
        )
    names, images = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name == _LEFT_BY_ARCHIVERS:
                continue
            if entry.is_dir():
                names.append(entry.name)
            elif entry.name.lower().endswith(EXTENSIONS):
                images.append(folder / entry.name)
    return sorted(names), sorted(images)


def _images_below(folder: Path, seen: set[tuple[int, int]]) -> list[Path]:
    """The images in a folder and below it, each folder once, so that links may go round in circles."""
    if (here := _identity(folder)) in seen:
        return []
    seen.add(here)
    names, images = _entries(folder)
    return sorted([*images, *(path for name in names for path in _images_below(folder / name, seen))])


def _identity(folder: Path) -> tuple[int, int]:
    stat = folder.stat()
    return stat.st_dev, stat.st_ino
