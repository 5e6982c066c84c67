"""Sizes of the data sets and the location of Omniglot, without loading any: for validating configurations. No torch."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from metalearn.core.errors import DataError
from metalearn.core.paths import expand_home

DRAWINGS_PER_CLASS = 20
"""Images of each class, in Omniglot and in glyphs."""

OMNIGLOT_PARTS = {"images_background": 964, "images_evaluation": 659}
"""The two folders of Omniglot and their numbers of classes (Lake et al. 2015)."""

OMNIGLOT_URL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
"""URL that torchvision downloads from."""


@dataclass(frozen=True)
class SplitSizes:
    """Numbers of classes for training (before rotations), validation and test."""

    train: int
    validation: int
    test: int

    @property
    def smallest(self) -> int:
        """The smallest split, which bounds the number of ways."""
        return min(self.train, self.validation, self.test)


OMNIGLOT_SPLITS = {"classic": SplitSizes(1100, 100, 423), "alphabets": SplitSizes(803, 161, 659)}

GLYPH_SPLIT_FRACTIONS = (0.7, 0.1)
"""Fractions of the glyph classes for training and validation; the rest is for the test."""


def glyph_split_sizes(classes: int) -> SplitSizes:
    """Return the split sizes of a number of glyph classes."""
    train, validation = (round(share * classes) for share in GLYPH_SPLIT_FRACTIONS)
    return SplitSizes(train, validation, classes - train - validation)


def cache_dir() -> Path:
    """Return the folder of verified tensors: ``$METALEARN_CACHE``, or metalearn's folder in the user's cache."""
    if folder := os.environ.get("METALEARN_CACHE"):
        return expand_home(folder)
    return expand_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "set METALEARN_CACHE=FOLDER") / "metalearn"


def omniglot_root(root: str | None) -> Path:
    """Return the folder to look in: ``root``, else ``$METALEARN_DATA``, else the default one."""
    named = root or os.environ.get("METALEARN_DATA")
    return expand_home(named) if named else cache_dir() / "data"


def omniglot_base(root: str | None) -> Path:
    """Return the folder of the two parts: ``omniglot-py`` below the root, or the root if they are there."""
    folder = omniglot_root(root)
    nested = folder / "omniglot-py"
    lies_here = any((folder / part).is_dir() for part in OMNIGLOT_PARTS)
    lies_below = any((nested / part).is_dir() for part in OMNIGLOT_PARTS)
    return folder if lies_here and not lies_below else nested


def omniglot_source(root: str | None) -> str:
    """Return where Omniglot comes from: ``"disk"``, ``"archives"`` (on disk, still packed) or ``"download"``.

    A folder that was named but does not exist is taken as a mistake and not created. Raises ``DataError``, which says
    why but names no remedy, if Omniglot is unavailable.
    """
    named = _named_root(root)
    try:
        folder, base = omniglot_root(root), omniglot_base(root)
        if named and not folder.is_dir():
            raise DataError(f"{named}: there is no such folder")
        missing = [part for part in OMNIGLOT_PARTS if not (base / part).is_dir()]
        if missing and all((base / f"{part}.zip").is_file() for part in missing):
            return "archives"
        if len(missing) < len(OMNIGLOT_PARTS):
            return "disk"  # if a part is missing, reading it raises
    except (OSError, RuntimeError) as error:  # a name too long, a missing permission, the home of an unknown user
        raise DataError(
            f"{named or 'data.root'}: this folder cannot be looked into ({str(error).rstrip('.')})"
        ) from error
    if _has_network():
        return "download"
    raise DataError(f"{named or folder}: this folder holds no Omniglot, and it cannot be downloaded from here")


def _named_root(root: str | None) -> str | None:
    """Return where the folder to look in was named, and how; ``None`` if it is the default one."""
    variable = os.environ.get("METALEARN_DATA")
    if variable and root in (None, "", variable):
        return f"METALEARN_DATA={variable}"
    return f"data.root={root}" if root else None


def omniglot_unavailable_reason(root: str | None) -> str | None:
    """Return why Omniglot is unavailable, or ``None`` if it is available."""
    try:
        omniglot_source(root)
    except DataError as error:
        return str(error)
    return None


def resolve_dataset(name: str, root: str | None, fallback: str | None) -> str:
    """Return the data set to train on: ``name``, or ``fallback`` if Omniglot is unavailable and no folder was named.

    Raises:
        DataError: if Omniglot is unavailable and nothing may take its place; the message names three remedies.
    """
    if name != "omniglot" or (reason := omniglot_unavailable_reason(root)) is None:
        return name
    if fallback is None or _named_root(root):
        raise DataError(
            f"{reason}. Three ways out:\n"
            "  data.root=FOLDER  that holds omniglot-py/; METALEARN_DATA=FOLDER does the same\n"
            "  a network         an existing FOLDER, or the default one, is then filled by download\n"
            "  data=glyphs       train on the embedded glyphs instead"
        )
    return fallback


@cache
def _has_network() -> bool:
    request = urllib.request.Request(f"{OMNIGLOT_URL}/images_background.zip", method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False
