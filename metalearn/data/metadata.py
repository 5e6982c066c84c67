"""What is known about the data sets before any is loaded: sizes, and where Omniglot lies. Imports no torch.

Configurations are checked against this page, so that a wrong one is refused at once.
"""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from metalearn.core.errors import DataError

DRAWINGS_PER_CLASS = 20
"""Images of each class, in Omniglot and in glyphs."""

OMNIGLOT_PARTS = {"images_background": 964, "images_evaluation": 659}
"""The two folders of Omniglot and their classes, 20 drawings each (Lake et al. 2015)."""

OMNIGLOT_URL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
"""Where torchvision downloads from; a test holds the two equal."""


@dataclass(frozen=True)
class SplitSizes:
    """Number of classes for training (before rotations), validation and test."""

    train: int
    validation: int
    test: int

    @property
    def smallest(self) -> int:
        """The number of ways can be no larger."""
        return min(self.train, self.validation, self.test)


OMNIGLOT_SPLITS = {"classic": SplitSizes(1100, 100, 423), "alphabets": SplitSizes(803, 161, 659)}

GLYPH_SPLIT_FRACTIONS = (0.7, 0.1)
"""Shares of the glyph classes for training and validation; the rest is for the test."""


def glyph_split_sizes(classes: int) -> SplitSizes:
    """Sizes of the splits of that many glyph classes."""
    train, validation = (round(share * classes) for share in GLYPH_SPLIT_FRACTIONS)
    return SplitSizes(train, validation, classes - train - validation)


def cache_dir() -> Path:
    """Where verified tensors are kept: ``$METALEARN_CACHE``, or metalearn's folder in the user's cache."""
    if own := os.environ.get("METALEARN_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "metalearn"


def omniglot_root(root: str | None) -> Path:
    """The folder to look in: ``root``, or the default one if that is ``None`` or empty."""
    return Path(root).expanduser() if root else cache_dir() / "data"


def omniglot_base(root: str | None) -> Path:
    """The folder of the two parts: ``omniglot-py`` below the root, or the root itself if they lie there."""
    folder = omniglot_root(root)
    nested = folder / "omniglot-py"
    lies_here = any((folder / part).is_dir() for part in OMNIGLOT_PARTS)
    lies_below = any((nested / part).is_dir() for part in OMNIGLOT_PARTS)
    return folder if lies_here and not lies_below else nested


def omniglot_source(root: str | None) -> str:
    """Where Omniglot would come from: ``"disk"``, ``"archives"`` that lie there to be unpacked, or ``"download"``.

    A folder that was named but does not exist is taken as a mistake and not created.

    Raises:
        DataError: if it can come from neither; the message says why, without a remedy.
    """
    try:
        return _source(root)
    except (OSError, RuntimeError) as error:  # a name too long, a folder closed to us, the home of a user who is not
        raise DataError(f"data.root={root}: this folder cannot be looked into ({str(error).rstrip('.')})") from error


def _source(root: str | None) -> str:
    folder = omniglot_root(root)
    if root and not folder.is_dir():
        raise DataError(f"data.root={root}: there is no such folder")
    base = omniglot_base(root)
    missing = [part for part in OMNIGLOT_PARTS if not (base / part).is_dir()]
    if missing and all((base / f"{part}.zip").is_file() for part in missing):
        return "archives"
    if len(missing) < len(OMNIGLOT_PARTS):
        return "disk"  # incomplete, if anything is missing: that is for its reader to say
    if _reachable():
        return "download"
    raise DataError(f"{folder} holds no Omniglot, and it cannot be downloaded from here")


def omniglot_unavailable_reason(root: str | None) -> str | None:
    """Why Omniglot cannot be had, or ``None`` if it can."""
    try:
        omniglot_source(root)
    except DataError as error:
        return str(error)
    return None


def resolve_dataset(name: str, root: str | None, fallback: str | None) -> str:
    """The data set that a run will train on: ``name``, or ``fallback`` where Omniglot cannot be had.

    Raises:
        DataError: if Omniglot cannot be had and there is no fallback; the message names the three ways out.
    """
    if name != "omniglot":
        return name
    if (reason := omniglot_unavailable_reason(root)) is not None:
        if fallback is None:
            raise DataError(
                f"{reason}, and data.fallback=null forbids another data set. Three ways out:\n"
                "  data.root=FOLDER       a folder that holds omniglot-py/ (METALEARN_DATA=FOLDER does the same)\n"
                "  mkdir -p FOLDER        with a network, an existing or the default folder is filled by download\n"
                "  data.fallback=glyphs   train on the embedded glyphs instead (or data=glyphs)"
            )
        return fallback
    return name


@cache
def _reachable() -> bool:
    request = urllib.request.Request(f"{OMNIGLOT_URL}/images_background.zip", method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False
