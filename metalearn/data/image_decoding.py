"""Decode a folder of images into uint8 tensors of one size.

An image is rotated as its EXIF says, laid over white where it is transparent, cropped to the central square, and
resized with antialiasing. The tensors are cached in one verified file outside of the folder, which is used only while
every image has the name, size and modification time that it had when it was read.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from rich.progress import track
from torch import Tensor

from metalearn.core.errors import DataError
from metalearn.core.paths import expand_home
from metalearn.core.short_repr import short_repr
from metalearn.core.text import MAX_LISTED, plural, preview_names
from metalearn.data.cache import load_or_build
from metalearn.data.class_split import ClassSplit, check_split_sizes, log_classes_left_out
from metalearn.data.image_folder import (
    check_classes_hold_images,
    class_sizes,
    list_classes,
    list_entries,
    list_images,
    list_passed_over,
    list_splits,
    log_passed_over,
    overlapping_classes,
)
from metalearn.data.metadata import cache_dir
from metalearn.data.pillow_warnings import collect_pillow_warnings, warnings_of
from metalearn.data.splits import ClassSizes, ImageSplits

log = logging.getLogger(__name__)

DECODING = "lanczos-1"  # part of the cache's key: another way to decode needs another name
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")  # whatever the extension; none that runs programs
_SIXTEEN_BITS = 65535


class UnreadableImagesError(DataError):
    """Files with the extension of an image that cannot be read as one."""


class FolderImages(NamedTuple):
    """A folder of images ``[examples, channels, size, size]`` uint8.

    ``labels`` are the class of each image, and ``classes`` their sorted names; without classes ``None`` and empty.
    """

    images: Tensor
    labels: list[str] | None
    classes: list[str]
    paths: list[Path]

    def __repr__(self) -> str:
        return short_repr(self)


@dataclass(frozen=True)
class ImageFormat:
    """The size and channels of decoded images."""

    size: int
    channels: int

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise ValueError(f"images: channels={self.channels}; it must be 1 (grey) or 3 (red, green, blue).")
        if self.size < 1:
            raise ValueError(f"images: size={self.size}; it must be at least 1.")


def load_image_splits(
    root: str | Path,
    *,
    size: int = 84,
    channels: int = 3,
    fractions: Sequence[float] = (0.6, 0.2, 0.2),
    seed: int = 0,
    class_split: ClassSplit = None,
    on_unreadable: str = "stop",
    ways: int = 1,
    needed: Mapping[str, int] | None = None,
) -> ImageSplits:
    """Load a folder of images, one sub-folder a class, split by class.

    Args:
        root: holds the classes, or folders ``train``, ``val`` and ``test`` of classes, as in ``image_folder``.
        size: height and width to resize to, in pixels.
        channels: 1 for grey, 3 for colour.
        fractions: of the classes for training, validation and test, if there are no folders of splits.
        seed: of that split.
        class_split: names of the classes of each split, instead: as ``read_class_split`` takes them.
        on_unreadable: ``"stop"`` at files that cannot be read, or ``"skip"`` them with a warning.
        ways: minimum number of classes in each split.
        needed: minimum number of images in each class of a split, by split; 1 by default.

    Raises:
        UnreadableImagesError: listing files that cannot be read.
        DataError: if the folder is empty, not laid out as above, or too small, or the class split does not fit.
        ValueError: if a setting is out of range.
    """
    fmt = ImageFormat(size, channels)
    _check_on_unreadable(on_unreadable)
    splits = list_splits(root, fractions=fractions, seed=seed, class_split=class_split)
    needed = needed or dict.fromkeys(splits, 1)
    check_split_sizes(class_sizes(splits), f"data.root={root}", ways=ways, needed=needed)
    folder = expand_home(root)
    log_passed_over(folder, list_passed_over(folder, splits))
    if class_split is not None:
        named = {split: [one.name for one in classes] for split, classes in splits.items()}
        log_classes_left_out(list_entries(folder).names, named, class_split)
    if overlapping := overlapping_classes(splits):
        log.warning(
            "%s: %s in more than one split, so that tests are not of new classes: %s.",
            *(root, plural(len(overlapping), "class is", "classes are"), preview_names(overlapping)),
        )
    # Sorted by path, which no setting of the split changes, so that one cache serves all splits.
    paths = sorted(path for classes in splits.values() for one in classes for path in one.files)
    images, unreadable = _load_or_decode(folder, paths, fmt)
    _handle_unreadable(paths, unreadable, on_unreadable)
    row = {path: i for i, path in enumerate(p for j, p in enumerate(paths) if j not in unreadable)}
    readable = {
        split: [one._replace(files=[path for path in one.files if path in row]) for one in classes]
        for split, classes in splits.items()
    }
    check_split_sizes(class_sizes(readable), f"data.root={root}", ways=ways, needed=needed)
    train, validation, test = (
        images[[row[path] for one in classes for path in one.files]] for classes in readable.values()
    )
    counts = ClassSizes(*([len(one.files) for one in classes] for classes in readable.values()))
    return ImageSplits("images", train, validation, test, counts)


def read_folder(
    path: str | Path, *, size: int, channels: int, on_unreadable: str = "stop", may_be_flat: bool = False
) -> FolderImages:
    """Read every image of a folder, one sub-folder a class, as a support or query set; settings as above.

    With ``may_be_flat`` the folder may hold images without classes instead.

    Raises:
        UnreadableImagesError: listing files that cannot be read.
        DataError: if the folder is missing or empty, a class has no images, or there are images outside of classes.
        ValueError: if a setting is out of range.
    """
    fmt = ImageFormat(size, channels)
    _check_on_unreadable(on_unreadable)
    folder = expand_home(path)
    try:
        flat = list_images(folder) if may_be_flat else None
        classes = [] if flat else list_classes(folder)
        check_classes_hold_images(folder, classes)
    except OSError as error:
        raise DataError(f"{folder}: this folder cannot be looked into ({error})") from error
    log_passed_over(folder, list_entries(folder).others if flat else [path for one in classes for path in one.others])
    paths = flat or [file for one in classes for file in one.files]
    labels = [label for label, one in enumerate(classes) for _ in one.files]
    images, unreadable, _ = _decode_all(paths, fmt)
    _handle_unreadable(paths, unreadable, on_unreadable)
    rows = [i for i in range(len(paths)) if i not in unreadable]
    without = [one.name for label, one in enumerate(classes) if label not in {labels[i] for i in rows}]
    if without or not rows:
        what = f"no readable image in {preview_names(without)}" if without else "no readable image"
        raise DataError(f"{folder} holds {what}. Add images, or remove such classes.")
    readable_labels = [classes[labels[i]].name for i in rows] if classes else None
    return FolderImages(images, readable_labels, [one.name for one in classes], [paths[i] for i in rows])


def _check_on_unreadable(choice: str) -> None:
    if choice not in ("stop", "skip"):
        raise ValueError(f"images: on_unreadable={choice!r}; it must be 'stop' or 'skip'.")


def _handle_unreadable(paths: Sequence[Path], unreadable: Mapping[int, str], choice: str) -> None:
    """Raise if files could not be read, or log a warning if they are skipped."""
    if not unreadable:
        return
    lines = _lines({paths[i]: why for i, why in unreadable.items()})
    what = f"{len(unreadable)} of {len(paths)} images cannot be read"
    if choice == "stop":
        raise UnreadableImagesError(
            "\n".join([f"{what}:", *lines, "Replace or remove them, or pass them over with data.on_unreadable=skip."])
        )
    log.warning("%s", "\n".join([f"{what} and are skipped (data.on_unreadable=skip):", *lines]))


def _lines(notes: Mapping[Path, str]) -> list[str]:
    """Return a line for each of the first few files, and how many more there are."""
    more = [f"  and {len(notes) - MAX_LISTED} more"] if len(notes) > MAX_LISTED else []
    return [f"  {path}: {note}" for path, note in list(notes.items())[:MAX_LISTED]] + more


def _load_or_decode(root: Path, paths: Sequence[Path], fmt: ImageFormat) -> tuple[Tensor, dict[int, str]]:
    """Return ``_decode_all`` from the cache, which has one file per folder and format, or decode the images."""
    fingerprint = _fingerprint(root, paths)

    def build() -> tuple[dict[str, Any], bool]:
        images, unreadable, permanent = _decode_all(paths, fmt)
        return {"fingerprint": fingerprint, "images": images, "unreadable": unreadable}, permanent

    place = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:12]
    cached = cache_dir() / f"images-{fmt.size}px-{fmt.channels}c-{place}.pt"
    content = load_or_build(
        cached, "The images", build, is_current=lambda content: content["fingerprint"] == fingerprint
    )
    return content["images"], content["unreadable"]


def _fingerprint(root: Path, paths: Sequence[Path]) -> str:
    """Return a digest of the names, sizes and modification times of all images, and of the decoding."""
    digest = hashlib.sha256(f"{DECODING}\n".encode())
    for path in paths:
        try:
            stat = path.stat()
            state = f"{stat.st_size} {stat.st_mtime_ns}"
        except OSError:  # a broken link; decoding it raises
            state = "missing"
        digest.update(os.fsencode(f"{path.relative_to(root)}\0{state}\n"))  # names need not be UTF-8
    return digest.hexdigest()


def _decode_all(paths: Sequence[Path], fmt: ImageFormat) -> tuple[Tensor, dict[int, str], bool]:
    """Return the readable images, the errors of the others by position, and whether these errors lie in the files.

    They may lie in a disk or a permission instead, which somebody may fix.
    """
    images = torch.empty(len(paths), fmt.channels, fmt.size, fmt.size, dtype=torch.uint8)
    pixels = images.numpy()
    unreadable: dict[int, str] = {}
    permanent = True

    def decode(number: int) -> Exception | None:
        try:
            with warnings_of(paths[number]):
                pixels[number] = _decode(paths[number], fmt)
        except MemoryError:
            raise
        except Exception as error:  # Pillow's readers raise many kinds for a broken file
            return error
        return None

    with collect_pillow_warnings() as warned, ThreadPoolExecutor() as pool:
        reading = track(pool.map(decode, range(len(paths))), "Reading images (once)", total=len(paths))
        for number, error in enumerate(reading):
            if error is not None:
                unreadable[number] = str(error).rstrip(".") or type(error).__name__
                permanent = permanent and not (isinstance(error, OSError) and error.errno is not None)
    if notes := {path: warned[path] for i, path in enumerate(paths) if path in warned and i not in unreadable}:
        what = f"Pillow warns of {plural(len(notes), 'image')}, and reads them all the same:"
        log.warning("%s", "\n".join([what, *_lines(notes)]))
    readable = [i for i in range(len(paths)) if i not in unreadable]
    return images[readable] if unreadable else images, unreadable, permanent


def _decode(path: Path, fmt: ImageFormat) -> NDArray[np.uint8]:
    """Decode one image, ``[channels, size, size]``."""
    if not path.is_file():  # reading a pipe would wait for ever
        raise OSError("it is no file, or a broken link")
    with Image.open(path, formats=_FORMATS) as image:
        if image.format == "PNG":
            image.verify()  # compares every checksum, which decoding alone does not do
    with Image.open(path, formats=_FORMATS) as image:
        image.draft(None, (2 * fmt.size, 2 * fmt.size))  # large JPEGs in a fraction of the time
        return to_pixels(image, fmt)


def to_pixels(image: Image.Image, fmt: ImageFormat) -> NDArray[np.uint8]:
    """Return an image's central square, resized, ``[channels, size, size]``."""
    plain = _to_8bit(image, "L" if fmt.channels == 1 else "RGB")
    square = ImageOps.fit(plain, (fmt.size, fmt.size), Image.Resampling.LANCZOS)
    pixels = np.asarray(square).reshape(fmt.size, fmt.size, fmt.channels)
    return pixels.transpose(2, 0, 1)


def _to_8bit(image: Image.Image, mode: str) -> Image.Image:
    """Convert to grey or colour of 8 bits a channel, over white where it is transparent."""
    is_16bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    image = ImageOps.exif_transpose(image)
    if is_16bit:
        grey = np.asarray(image).astype(np.float64) * (255 / _SIXTEEN_BITS)
        return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8)).convert(mode)
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are of mode {image.mode}, whose range is not known; save it with 8 or 16 bits")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert(mode)
    return image.convert(mode)
