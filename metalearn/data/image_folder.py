"""List a user's folder of images, one sub-folder a class, without opening a file. Imports no torch.

Configurations are validated against this listing, so that a folder that is too small for the task fails at once.

    root/train/CLASS/*.jpg (training)           or    root/CLASS/*.jpg
    root/val/CLASS/*.jpg   (validation, valid)        (classes are split by fractions)
    root/test/CLASS/*.jpg  (testing)                  in upper case too
"""

from __future__ import annotations

import errno
import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from metalearn.core.errors import DataError
from metalearn.core.paths import expand_home
from metalearn.core.text import plural, preview_names
from metalearn.data.class_split import ClassSplit, split_classes

log = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Extensions of images, in upper case too: torchvision's list."""

_FOLDERS = {"train": ("train", "training"), "validation": ("val", "valid", "validation"), "test": ("test", "testing")}
_IGNORED_NAMES = {
    *("__macosx", "lost+found", "$recycle.bin", "recycler", "system volume information", "thumbs.db", "desktop.ini"),
    *("@eadir", "@tmp", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@__thumb", "~snapshot"),
    *("network trash folder", "temporary items", "icon\r"),
}
"""Of macOS, Linux, Windows, Synology, QNAP, NetApp and AFP, in lower case; some hold thumbnails of the images."""


class Entries(NamedTuple):
    """A folder's entries: names of sub-folders, paths of images, and paths of other files; each sorted."""

    names: list[str]
    images: list[Path]
    others: list[Path]


class ImageClass(NamedTuple):
    """One class: the name of its folder, the sorted paths of its images, and those of files that are passed over."""

    name: str
    files: list[Path]
    others: Sequence[Path] = ()

    @property
    def label(self) -> str:
        """The name, with the kinds of the files that are passed over."""
        return f"{self.name} ({describe_passed_over(self.others)})" if self.others else self.name


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

    Hidden entries, helper folders of file systems and files that are no images are passed over.

    Raises:
        DataError: if there is no such folder, no image in it, an image outside of a class, or a split is missing, or
            the class split does not fit.
        ValueError: if the fractions are not three that add up to 1.
    """
    folder = expand_home(root)
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
    names, loose, others = list_entries(folder)
    if names and loose:
        raise DataError(
            f"{folder} holds classes ({preview_names(names)}) and also images "
            f"({preview_names([p.name for p in loose])}), which belong to no class. Put them into the folder of their "
            "class, or remove them."
        )
    classes = [ImageClass(name, *_files_below(folder / name, {_identity(folder)})) for name in names]
    if not any(one.files for one in classes):
        found = f"{plural(len(loose), 'image')} but no folders of classes" if loose else "no images"
        if others := [*others, *(path for one in classes for path in one.others)]:
            found += f" ({describe_passed_over(others)})"
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
    names, loose, _ = list_entries(folder)
    return loose if loose and not names else None


def class_sizes(splits: Splits) -> dict[str, list[tuple[str, int]]]:
    """Return the label of each class, and its number of images, by split."""
    return {split: [(one.label, len(one.files)) for one in classes] for split, classes in splits.items()}


def describe_passed_over(paths: Sequence[Path]) -> str:
    """Count files that are not read as images by their endings, as ``3 .gif, 1 .heic passed over``."""
    kinds = Counter(path.suffix.lower() or "without an ending" for path in paths if os.path.exists(path))
    lost = [path.name for path in paths if not os.path.exists(path)]
    links = [f"{plural(len(lost), 'link')} to nowhere ({preview_names(lost)})"] if lost else []
    return f"{preview_names(links + [f'{count} {kind}' for kind, count in kinds.most_common()])} passed over"


def log_passed_over(folder: Path, paths: Sequence[Path]) -> None:
    """Log a warning that counts the files of a folder that are not read."""
    if paths:
        log.warning(
            "%s: %s. Images are %s by their names: convert those of other formats, or rename them.",
            *(folder, describe_passed_over(paths), ", ".join(EXTENSIONS)),
        )


def list_passed_over(root: Path, splits: Splits) -> list[Path]:
    """Return the files in classes that are not read as images, and the links in the place of a class to nowhere."""
    places = [root, *(root / name for name in list_entries(root).names if _split_of(name))]
    links = {path for place in places for path in list_entries(place).others if not os.path.exists(path)}
    return sorted(links.union(*(one.others for classes in splits.values() for one in classes)))


def overlapping_classes(splits: Splits) -> list[str]:
    """Return the names of classes that are in more than one split."""
    names = [one.name for classes in splits.values() for one in classes]
    return sorted({name for name in names if names.count(name) > 1})


def _split_of(name: str) -> str | None:
    """Return the split that a folder is named after."""
    return next((split for split, choices in _FOLDERS.items() if name.casefold() in choices), None)


def _split_folders(root: Path) -> dict[str, Path] | None:
    """Return the folder of each split, or ``None`` if the root holds classes."""
    names = list_entries(root).names
    found = {split: [name for name in names if _split_of(name) == split] for split in _FOLDERS}
    others = [name for name in names if not _split_of(name)]
    kinds = sum(map(bool, found.values()))
    if kinds < 2 and (others or not found["train"]):  # a class of trains, say
        return None
    if kinds < len(found) and others and not any(name.casefold() == "train" for name in names):  # and of trainings
        return None
    for split, folders in found.items():
        if len(folders) != 1:
            what = f"more than one folder for {split} ({', '.join(folders)})" if folders else f"none for {split}"
            named = next(folders[0] for folders in found.values() if folders)
            raise DataError(
                f"{root} holds a folder {named}, so it is split by folders, but it has {what}. It must hold train, one "
                "of val, valid and validation, and test; or classes alone, to be split by data.fractions."
            )
    if others:
        raise DataError(
            f"{root} is split by folders ({', '.join(folders[0] for folders in found.values())}) and also holds "
            f"others: {preview_names(others)}. Move these into a split, or remove them."
        )
    return {split: root / folders[0] for split, folders in found.items()}


def why_no_folder(path: Path) -> str:
    """Return what is wrong with a path that is no folder."""
    return "this is a file; name its folder" if path.is_file() else "there is no such folder"


def list_entries(folder: Path) -> Entries:
    """Return what a folder holds, without hidden entries and helper folders of file systems; links are followed."""
    found = Entries([], [], [])
    try:
        if not folder.is_dir():
            raise DataError(f"{folder}: {why_no_folder(folder)}")
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name.casefold() in _IGNORED_NAMES:
                    continue
                if _is_folder(entry):
                    found.names.append(entry.name)
                elif entry.name.lower().endswith(EXTENSIONS):
                    found.images.append(folder / entry.name)
                else:
                    found.others.append(folder / entry.name)
    except OSError as error:
        raise DataError(f"{folder}: this folder cannot be looked into ({error})") from error
    return Entries(sorted(found.names), sorted(found.images), sorted(found.others))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link that leads to itself leads nowhere
            return False
        raise


def _files_below(folder: Path, seen: set[tuple[int, int]]) -> tuple[list[Path], list[Path]]:
    """List images and other files in a folder and below it, visiting each folder once, as links may form cycles."""
    if (here := _identity(folder)) in seen:
        return [], []
    seen.add(here)
    names, images, others = list_entries(folder)
    for name in names:
        more_images, more_others = _files_below(folder / name, seen)
        images += more_images
        others += more_others
    return sorted(images), sorted(others)


def _identity(folder: Path) -> tuple[int, int]:
    stat = folder.stat()
    return stat.st_dev, stat.st_ino
