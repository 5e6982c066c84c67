"""A user's own images as uint8 tensors of one size: any format, mode and size that Pillow reads.

An image is turned as its EXIF says, laid over white where it is transparent, cropped to the square in its middle, and
resized with antialiasing. The tensors are kept in one verified file outside of the folder, and used only while every
image has the name, the size and the time of change that it had when it was read.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from rich.progress import track
from torch import Tensor

from metalearn.core import serialization as files
from metalearn.core.errors import DataError
from metalearn.data.image_folder import (
    SHOWN,
    ImageClass,
    check_split_sizes,
    in_several,
    list_classes,
    list_images,
    list_splits,
    preview_names,
)
from metalearn.data.metadata import cache_dir
from metalearn.data.splits import ClassSizes, ImageSplits

log = logging.getLogger(__name__)

_DECODING = "lanczos-1"  # part of the cache's key: another way to decode needs another name
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")  # a name often lies; formats that run programs are out
_SIXTEEN_BITS = 65535


class UnreadableImagesError(DataError):
    """Files that are named like images, and cannot be read as such."""


class FolderImages(NamedTuple):
    """A folder of images.

    Args:
        images: ``[examples, channels, size, size]`` uint8.
        labels: ``[examples]`` int64, positions in ``classes``; ``None`` for images without classes.
        classes: names, sorted; empty for images without classes.
        paths: of every image.
    """

    images: Tensor
    labels: Tensor | None
    classes: list[str]
    paths: list[Path]


@dataclass(frozen=True)
class _ImageFormat:
    """What images are made to look like."""

    size: int
    channels: int

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise ValueError(f"images: channels={self.channels}; it must be 1 (grey) or 3 (red, green, blue).")
        if self.size < 1:
            raise ValueError(f"images: size={self.size}; it must be at least 1.")


class _DecodeResult(NamedTuple):
    """Pixels of the readable ones among some files, and why the others, by position, are not.

    ``lasting``: whether that lies in the files, and not in a disk or a permission that may be mended meanwhile.
    """

    images: Tensor
    unreadable: dict[int, str]
    lasting: bool = True


def load_image_splits(
    root: str | Path,
    *,
    size: int = 84,
    channels: int = 3,
    fractions: Sequence[float] = (0.6, 0.2, 0.2),
    seed: int = 0,
    unreadable: str = "stop",
    ways: int = 1,
    needed: Mapping[str, int] | None = None,
) -> ImageSplits:
    """A folder of images, one sub-folder a class, split by class.

    Args:
        root: holds the classes, or folders ``train``, ``val`` (or ``valid``, ``validation``) and ``test`` of classes.
        size: height and width to resize to, in pixels.
        channels: 1 for grey, 3 for colour.
        fractions: shares of the classes for training, validation and test, if there are no folders of splits.
        seed: of that split.
        unreadable: ``"stop"`` at files that cannot be read, or ``"skip"`` them with a warning.
        ways: the fewest classes that each split must have.
        needed: the fewest images that each class of a split must have, by split; one if not given.

    Raises:
        UnreadableImagesError: naming files that cannot be read.
        DataError: if the folder is empty, not laid out as above, or too small.
        ValueError: for settings that are none.
    """
    form = _ImageFormat(size, channels)
    _check_unreadable(unreadable)
    splits = list_splits(root, fractions=fractions, seed=seed)
    needed = needed or dict.fromkeys(splits, 1)
    check_split_sizes(_sizes(splits), root, ways=ways, needed=needed)
    if twice := in_several(splits):
        log.warning(
            "%s: %d classes are in more than one split, so that tests are not of new classes: %s.",
            *(root, len(twice), preview_names(twice)),
        )
    # In the order of the paths, which no setting of the split changes: one cache serves all of these.
    paths = sorted(path for classes in splits.values() for one in classes for path in one.files)
    read = _cached(Path(root).expanduser(), paths, form)
    _report(paths, read.unreadable, unreadable)
    row = {path: i for i, path in enumerate(p for j, p in enumerate(paths) if j not in read.unreadable)}
    kept = {
        split: [ImageClass(one.name, [path for path in one.files if path in row]) for one in classes]
        for split, classes in splits.items()
    }
    check_split_sizes(_sizes(kept), root, ways=ways, needed=needed)
    train, validation, test = (
        read.images[[row[path] for one in classes for path in one.files]] for classes in kept.values()
    )
    counts = ClassSizes(*([len(one.files) for one in classes] for classes in kept.values()))
    return ImageSplits("images", train, validation, test, counts)


def read_folder(
    path: str | Path, *, size: int, channels: int, unreadable: str = "stop", may_be_flat: bool = False
) -> FolderImages:
    """Every image of a folder of classes, as a support or query set.

    Args:
        path: holds one folder a class.
        size: height and width to resize to, in pixels.
        channels: 1 for grey, 3 for colour.
        unreadable: ``"stop"`` at files that cannot be read, or ``"skip"`` them with a warning.
        may_be_flat: whether it may hold images without classes instead.

    Raises:
        UnreadableImagesError: naming files that cannot be read.
        DataError: if there is no such folder, nothing in it, a class without images, or images beside classes.
        ValueError: for settings that are none.
    """
    form = _ImageFormat(size, channels)
    _check_unreadable(unreadable)
    folder = Path(path).expanduser()
    try:
        flat = list_images(folder) if may_be_flat else None
        classes = [] if flat else list_classes(folder)
    except OSError as error:
        raise DataError(f"{folder}: this folder cannot be looked into ({error})") from error
    paths = flat or [file for one in classes for file in one.files]
    labels = [label for label, one in enumerate(classes) for _ in one.files]
    read = _decode_all(paths, form)
    _report(paths, read.unreadable, unreadable)
    rows = [i for i in range(len(paths)) if i not in read.unreadable]
    without = [one.name for label, one in enumerate(classes) if label not in {labels[i] for i in rows}]
    if without or not rows:
        what = f"no readable image in {preview_names(without)}" if without else "no readable image"
        raise DataError(f"{folder} holds {what}. Add images, or remove such classes.")
    kept = torch.tensor([labels[i] for i in rows]) if classes else None
    return FolderImages(read.images, kept, [one.name for one in classes], [paths[i] for i in rows])


def _check_unreadable(choice: str) -> None:
    if choice not in ("stop", "skip"):
        raise ValueError(f"images: unreadable={choice!r}; it must be 'stop' or 'skip'.")


def _sizes(splits: Mapping[str, Sequence[ImageClass]]) -> dict[str, list[tuple[str, int]]]:
    return {split: [(one.name, len(one.files)) for one in classes] for split, classes in splits.items()}


def _report(paths: Sequence[Path], unreadable: Mapping[int, str], choice: str) -> None:
    """Stop at files that could not be read, or say which are passed over."""
    if not unreadable:
        return
    lines = [f"  {paths[i]}: {why}" for i, why in list(unreadable.items())[:SHOWN]]
    lines += [f"  and {len(unreadable) - SHOWN} more"] if len(unreadable) > SHOWN else []
    what = f"{len(unreadable)} of {len(paths)} images cannot be read"
    if choice == "stop":
        raise UnreadableImagesError(
            "\n".join([f"{what}:", *lines, "Replace or remove them, or pass them over with data.on_unreadable=skip."])
        )
    log.warning("%s", "\n".join([f"{what} and are passed over (data.on_unreadable=skip):", *lines]))


def _cached(root: Path, paths: Sequence[Path], form: _ImageFormat) -> _DecodeResult:
    """The images from the cache, or from disk; a folder has one file there for each form."""
    place = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:12]
    cached = cache_dir() / f"images-{form.size}px-{form.channels}c-{place}.pt"
    fingerprint = _fingerprint(root, paths)
    try:
        content = files.load_checked(cached)
        if content["fingerprint"] == fingerprint:
            return _DecodeResult(content["images"], content["unreadable"])
    except OSError:  # none yet, or a folder that cannot be read
        pass
    except files.CorruptFileError as error:
        log.warning("%s It is made anew.", error)
    read = _decode_all(paths, form)
    if read.lasting:
        try:
            files.save_checked(
                {"fingerprint": fingerprint, "images": read.images, "unreadable": read.unreadable}, cached
            )
        except OSError as error:
            log.warning("The images could not be cached, so every run will read them again: %s", error)
    return read


def _fingerprint(root: Path, paths: Sequence[Path]) -> str:
    """Of the names, sizes and times of change of all images, and of how they are read."""
    digest = hashlib.sha256(f"{_DECODING}\n".encode())
    for path in paths:
        try:
            stat = path.stat()
            state = f"{stat.st_size} {stat.st_mtime_ns}"
        except OSError:  # a link to nowhere; its reader says so
            state = "missing"
        digest.update(os.fsencode(f"{path.relative_to(root)}\0{state}\n"))  # names need not be UTF-8
    return digest.hexdigest()


def _decode_all(paths: Sequence[Path], form: _ImageFormat) -> _DecodeResult:
    images = torch.empty(len(paths), form.channels, form.size, form.size, dtype=torch.uint8)
    pixels = images.numpy()
    unreadable: dict[int, str] = {}
    lasting = True

    def decode(number: int) -> Exception | None:
        try:
            pixels[number] = _decode(paths[number], form)
        except MemoryError:
            raise
        except Exception as error:  # of any kind: what Pillow's readers raise for a broken file is not of one
            return error
        return None

    with ThreadPoolExecutor() as pool:
        reading = track(pool.map(decode, range(len(paths))), "Reading images (once)", total=len(paths))
        for number, error in enumerate(reading):
            if error is not None:
                unreadable[number] = str(error).rstrip(".") or type(error).__name__
                lasting = lasting and not (isinstance(error, OSError) and error.errno is not None)
    kept = [i for i in range(len(paths)) if i not in unreadable]
    return _DecodeResult(images[kept] if unreadable else images, unreadable, lasting)


def _decode(path: Path, form: _ImageFormat) -> NDArray[np.uint8]:
    """One image, ``[channels, size, size]``."""
    if not path.is_file():  # reading a pipe would wait for ever
        raise OSError("it is no file, or a link to nowhere")
    with Image.open(path, formats=_FORMATS) as image:
        if image.format == "PNG":
            image.verify()  # compares every checksum, which decoding alone does not do
    with Image.open(path, formats=_FORMATS) as image:
        image.draft(None, (2 * form.size, 2 * form.size))  # large JPEGs in a fraction of the time
        plain = _plain(image, "L" if form.channels == 1 else "RGB")
    square = ImageOps.fit(plain, (form.size, form.size), Image.Resampling.LANCZOS)
    pixels = np.asarray(square).reshape(form.size, form.size, form.channels)
    return pixels.transpose(2, 0, 1)


def _plain(image: Image.Image, mode: str) -> Image.Image:
    """Grey or colour of 8 bits a channel, over white where it is transparent."""
    wide = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    image = ImageOps.exif_transpose(image)
    if wide:
        grey = np.asarray(image).astype(np.float64) * (255 / _SIXTEEN_BITS)
        return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8)).convert(mode)
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are of mode {image.mode}, whose range is not known; save it with 8 or 16 bits")
    if image.has_transparency_data:
        over = image.convert("RGBA")
        white = Image.new("RGBA", over.size, "white")
        return Image.alpha_composite(white, over).convert(mode)
    return image.convert(mode)
