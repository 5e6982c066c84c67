"""Omniglot (Lake et al. 2015), verified, as one uint8 tensor: 1,623 characters, 20 drawings each, and its splits.

torchvision downloads and unpacks it. The files on disk are checked here in sorted order, and cached as one tensor
outside of ``root``; the cache is used only while every file has the size and modification time that it had when it was
read.
"""

from __future__ import annotations

import hashlib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from stat import S_ISREG
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from rich.progress import track
from torch import Tensor

from metalearn.core.errors import DataError
from metalearn.core.short_repr import short_repr
from metalearn.core.text import plural
from metalearn.data.cache import load_or_build
from metalearn.data.metadata import DRAWINGS_PER_CLASS, OMNIGLOT_PARTS, OMNIGLOT_SPLITS, cache_dir, omniglot_base
from metalearn.data.omniglot_download import ensure_omniglot
from metalearn.data.pillow_warnings import collect_pillow_warnings, warnings_of
from metalearn.data.splits import ImageSplits, with_rotations

SIZE = 28
_DECODING = "28px-lanczos-1"  # part of the cache's name: another way to decode needs another name
_VALIDATION_ALPHABETS = 5
_PIXELS_SHA256 = {
    "images_background": "51ca506ce7ea3430a8b51e6e6426a1035e782f1b3fdd7d385232445603f2f4b6",
    "images_evaluation": "57262cc3e42fa55b35985f8f2df924c5716fcf2a372bf410590b5c66b4698ebd",
}
"""Digest of every drawing's 105 x 105 bits in sorted order, so that exchanged or edited drawings are noticed."""


class OmniglotImages(NamedTuple):
    """All of Omniglot: uint8 images ``[1623, 20, 1, 28, 28]``, white on black; alphabet and part of each class."""

    images: Tensor
    alphabets: list[str]
    parts: list[str]

    def __repr__(self) -> str:
        return short_repr(self)


def load_omniglot(
    root: str | None = None, *, split: str = "classic", rotations: bool = True, rotate_test: bool = False
) -> ImageSplits:
    """Load Omniglot, split by class.

    Args:
        root: folder that holds ``omniglot-py``, as torchvision lays it out; ``None`` for ``$METALEARN_DATA``, or the
            default one, which is filled by download.
        split: ``"classic"``: 1100 / 100 / 423 classes at random, by a fixed seed (as Vinyals et al. 2016 and
            Finn et al. 2017 do); ``"alphabets"``: whole alphabets, the original evaluation set as test and five
            background alphabets for validation (803 / 161 / 659).
        rotations: whether to add training classes rotated by multiples of 90 degrees.
        rotate_test: whether to add validation and test classes so rotated. (The code of Finn et al. rotates each class
            of a test task at random: the same tasks, but for two rotations of one character, which it never shows
            together.)

    Raises:
        DataError: if it is unavailable, incomplete or damaged; the message names the folder or file.
        ValueError: if there is no such split.
    """
    if split not in OMNIGLOT_SPLITS:
        raise ValueError(f"omniglot: split={split!r}; it must be one of {', '.join(OMNIGLOT_SPLITS)}.")
    characters = load_characters(root)
    train, validation, test = _classic_split() if split == "classic" else _alphabet_split(characters)
    train_images, validation_images, test_images = (
        with_rotations(characters.images[classes]) if rotated else characters.images[classes]
        for classes, rotated in ((train, rotations), (validation, rotate_test), (test, rotate_test))
    )
    return ImageSplits("omniglot", train_images, validation_images, test_images)


def load_characters(root: str | None = None) -> OmniglotImages:
    """Load every class from the cache or from disk, after a download if it is missing."""
    ensure_omniglot(root)
    base = omniglot_base(root)
    try:
        drawings, fingerprint = _list_drawings(base)
    except OSError as error:
        raise DataError(f"Omniglot in {base} cannot be read: {error}") from error
    cached = cache_dir() / f"omniglot-{_DECODING}-{fingerprint[:16]}.pt"
    images = load_or_build(cached, "Omniglot", lambda: (_decode(drawings), True))
    classes = [drawing.parent for drawing in drawings[::DRAWINGS_PER_CLASS]]
    return OmniglotImages(images, [c.parent.name for c in classes], [c.parent.parent.name for c in classes])


def _list_drawings(base: Path) -> tuple[list[Path], str]:
    """Return the sorted paths of all drawings, and a digest of names, sizes and modification times."""
    drawings: list[Path] = []
    digest = hashlib.sha256()
    for part, n_classes in OMNIGLOT_PARTS.items():
        if not (base / part).is_dir():
            raise DataError(_incomplete_error(base, f"the folder {part} is missing"))
        classes = [character for alphabet in _subfolders(base / part) for character in _subfolders(alphabet)]
        for character in classes:
            entries = (entry for entry in os.scandir(character) if re.fullmatch(r"\d{4}_\d{2}\.png", entry.name))
            images = sorted(entries, key=lambda entry: entry.name)
            numbers = [int(image.name[5:7]) for image in images]
            if numbers != list(range(1, DRAWINGS_PER_CLASS + 1)) or len({image.name[:4] for image in images}) != 1:
                what = f"{character.relative_to(base)} holds {plural(len(images), 'drawing')}"
                raise DataError(
                    _incomplete_error(base, f"{what} and not {DRAWINGS_PER_CLASS} of one number, _01.png to _20.png")
                )
            drawings += [Path(image.path) for image in images]
            for image in images:
                stat = image.stat()
                if not S_ISREG(stat.st_mode):  # reading a pipe would wait for ever
                    raise DataError(f"Omniglot's {image.path} is no file. Replace it, or the whole folder.")
                line = f"{part}/{character.name}/{image.name} {stat.st_size} {stat.st_mtime_ns}\n"
                digest.update(os.fsencode(line))  # names need not be UTF-8
        if len(classes) != n_classes:
            raise DataError(
                _incomplete_error(base, f"{part} holds {plural(len(classes), 'character')} and not {n_classes}")
            )
    return drawings, digest.hexdigest()


def _subfolders(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _incomplete_error(base: Path, what: str) -> str:
    return (
        f"Omniglot in {base} is incomplete: {what}. Was a copy or an extraction interrupted? Remove that folder, "
        "not a part of it, and copy it again, or run again with a network to download it."
    )


def _decode(drawings: list[Path]) -> Tensor:
    """Return ``[classes, 20, 1, 28, 28]`` uint8, ink white, after comparing all pixels with their digest."""
    digests = {part: hashlib.sha256() for part in OMNIGLOT_PARTS}
    images = []
    with collect_pillow_warnings(), ThreadPoolExecutor() as pool:  # every fault is an error here
        reading = track(pool.map(_read_drawing, drawings), "Reading and checking Omniglot (once)", total=len(drawings))
        for path, (bits, image) in zip(drawings, reading, strict=True):
            digests[path.parts[-4]].update(bits)
            images.append(image)
    for part, digest in digests.items():
        if digest.hexdigest() != _PIXELS_SHA256[part]:
            folder = drawings[0].parents[3] / part
            raise DataError(
                f"Omniglot's {folder} is damaged: it has the right files, but their pixels are not the published ones; "
                "some drawing or character was exchanged or edited. Replace the folder."
            )
    return torch.from_numpy(np.stack(images)).view(-1, DRAWINGS_PER_CLASS, 1, SIZE, SIZE)


_DECODE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""Exceptions that Pillow raises for a broken PNG."""


def _read_drawing(path: Path) -> tuple[bytes, NDArray[np.uint8]]:
    """Return one drawing's bits, and the drawing inverted and resized.

    ``verify`` compares every checksum in the file, which decoding alone does not do.
    """
    try:
        with warnings_of(path), Image.open(path, formats=["PNG"]) as image:
            image.verify()
        with warnings_of(path), Image.open(path, formats=["PNG"]) as image:
            if image.size != (105, 105):
                raise ValueError(f"it measures {image.size} pixels and not (105, 105)")
            bits = image.convert("1").tobytes()
            small = image.convert("L").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    except _DECODE_ERRORS as error:
        raise DataError(f"Omniglot's {path} is damaged: {error}. Replace it, or the whole folder.") from error
    return bits, np.asarray(ImageOps.invert(small))


def _classic_split() -> list[list[int]]:
    # RandomState's stream will never change, unlike that of numpy's and torch's newer generators.
    order = np.random.RandomState(0).permutation(sum(OMNIGLOT_PARTS.values())).tolist()
    sizes = OMNIGLOT_SPLITS["classic"]
    return [order[: sizes.train], order[sizes.train : -sizes.test], order[-sizes.test :]]


def _alphabet_split(characters: OmniglotImages) -> list[list[int]]:
    pairs = zip(characters.alphabets, characters.parts, strict=True)
    background = sorted({alphabet for alphabet, part in pairs if part == "images_background"})
    held_out = set(np.random.RandomState(0).permutation(background)[:_VALIDATION_ALPHABETS].tolist())
    splits: list[list[int]] = [[], [], []]
    for index, (alphabet, part) in enumerate(zip(characters.alphabets, characters.parts, strict=True)):
        splits[2 if part == "images_evaluation" else 1 if alphabet in held_out else 0].append(index)
    return splits
