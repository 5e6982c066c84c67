"""List a user's folder of images, one sub-folder a class, without opening a file. Imports no torch.

Configurations are validated against this listing, so that a folder that is too small for the task fails at once.

    root/train/CLASS/*.jpg                or    root/CLASS/*.jpg
    root/val/CLASS/*.jpg   (validation, valid)  (classes are split by fractions)
    root/test/CLASS/*.jpg
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from metalearn.core.errors import DataError
from metalearn.core.text import plural, preview_names
from metalearn.data.class_split import ClassSplit, split_classes

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Extensions of images, in upper case too: torchvision's list."""

_FOLDERS = {"train": ("train",), "validation": ("val", "valid", "validation"), "test": ("test",)}
_IGNORED_NAMES = ("__MACOSX",)


class ImageClass(NamedTuple):
    """One class: the name of its folder, and the sorted paths of its images."""

    name: str
    files: list[Path]


Splits = dict[str, list[ImageClass]]
"""Classes of ``"train"``, ``"validation"`` and ``"test"``, sorted by name."""


def list_splits(
    root: str | Path,
    *,
    fractions: Sequence[float] = (0.6, 0.2, 0.2),
    seed: int = 0,
    class_split: ClassSplit = None,
) -> Splits:
    """List the classes of every split: by folder if there is a ``train/``, else as ``split_classes`` divides them.

    Hidden entries and files that are no images are ignored.

    Raises:
        DataError: if there is no such folder, no image in it, an image outside of a class, or a split is missing, or
            the class split does not fit.
        ValueError: if the fractions are not three that add up to 1.
    """
    folder = Path(root).expanduser()
    try:
        folders = _split_folders(folder)
        if folders and class_split is not None:
            raise DataError(
                f"data.class_split: {root} is split by folders already (train, validation, test). Leave it out, or "
                "name a folder whose sub-folders are all the classes"
            )
        if folders:
            return {split: list_classes(place) for split, place in folders.items()}
        classes = {one.name: one for one in list_classes(folder)}
        splits = split_classes([*classes], f"data.root={root}", fractions=fractions, seed=seed, class_split=class_split)
        return {split: [classes[name] for name in names] for split, names in splits.items()}
    except (OSError, RuntimeError) as error:  # a missing permission, a name too long, the home of an unknown user
        raise DataError(f"{root}: this folder cannot be looked into ({str(error).rstrip('.')})") from error


def list_classes(folder: Path) -> list[ImageClass]:
    """List the sub-folders of a folder, each with the images in it and below it.

    Raises ``DataError`` without such a folder, without an image in a sub-folder, or with one outside of them.
    """
    names, loose = list_entries(folder)
    if names and loose:
        raise DataError(
            f"{folder} holds classes ({preview_names(names)}) and also images "
            f"({preview_names([p.name for p in loose])}), which belong to no class. Put them into the folder of their "
            "class, or remove them."
        )
    classes = [ImageClass(name, _images_below(folder / name, {_identity(folder)})) for name in names]
    if not any(one.files for one in classes):
        found = f"{plural(len(loose), 'image')} but no folders of classes" if loose else "no images"
        raise DataError(
            f"{folder} holds {found}. It must hold one folder a class, with images in it ({', '.join(EXTENSIONS)})."
        )
    return classes


def check_classes_hold_images(folder: Path, classes: Sequence[ImageClass]) -> None:
    """Check that the folders of a support or query set are classes, and not folders of classes.

    A class may hold its images in a folder of their own, as ``CLASS/images/``.

    Raises:
        DataError: if every folder holds nothing but folders, and one of them several.
    """
    inside = {one.name: {file.relative_to(folder / one.name).parts[:-1] for file in one.files} for one in classes}
    if () in {place for places in inside.values() for place in places}:
        return
    for name, places in inside.items():
        if len(below := sorted({place[0] for place in places})) > 1:
            raise DataError(
                f"{folder} holds folders of folders ({name} holds {preview_names(below)}), and none with images right "
                f"in it. Name the folder whose sub-folders are the classes, as {folder / name}."
            )


def list_images(folder: Path) -> list[Path] | None:
    """List the images of a folder without classes, sorted; ``None`` if it has sub-folders or no image."""
    names, loose = list_entries(folder)
    return loose if loose and not names else None


def overlapping_classes(splits: Splits) -> list[str]:
    """Return the names of classes that are in more than one split."""
    names = [one.name for classes in splits.values() for one in classes]
    return sorted({name for name in names if names.count(name) > 1})


def _split_folders(root: Path) -> dict[str, Path] | None:
    """Return the folder of each split, or ``None`` if the root holds classes."""
    names, _ = list_entries(root)
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
            f"{root} is split by folders (train, {found['validation'][0]}, test) and also holds others: "
            f"{preview_names(others)}. Move these into a split, or remove them."
        )
    return {split: root / folders[0] for split, folders in found.items()}


def list_entries(folder: Path) -> tuple[list[str], list[Path]]:
    """Return the names of the sub-folders, and the paths of the images, both sorted."""
    if not folder.is_dir():
        raise DataError(
            f"{folder}: this is a file; name its folder" if folder.is_file() else f"{folder}: there is no such folder"
        )
    names, images = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name in _IGNORED_NAMES:
                continue
            if entry.is_dir():
                names.append(entry.name)
            elif entry.name.lower().endswith(EXTENSIONS):
                images.append(folder / entry.name)
    return sorted(names), sorted(images)


def _images_below(folder: Path, seen: set[tuple[int, int]]) -> list[Path]:
    """List the images in a folder and below it, visiting each folder once, as links may form cycles."""
    if (here := _identity(folder)) in seen:
        return []
    seen.add(here)
    names, images = list_entries(folder)
    return sorted([*images, *(path for name in names for path in _images_below(folder / name, seen))])


def _identity(folder: Path) -> tuple[int, int]:
    stat = folder.stat()
    return stat.st_dev, stat.st_ino
