"""A small Omniglot in place of the real one."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metalearn.data import metadata as catalog
from metalearn.data import omniglot, omniglot_download

PIXELS = {
    "images_background": "a90972222e6da451049dbf89c759b11589db2d9eff9365c33fcbe6be6d2f9188",
    "images_evaluation": "b5c12022fe2fc72d9cdc0b9451cd636578d58a3ddae0d03c4924404d11e8baad",
}
PARTS = {"images_background": 3, "images_evaluation": 2}


@pytest.fixture
def small_omniglot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Replace the 1,623 classes by five, without a network and with an empty cache."""
    stand_in(monkeypatch, tmp_path / "own cache")


@pytest.fixture
def root(small_omniglot: None, tmp_path: Path) -> Path:
    """Return the folder of ``make_root``."""
    return make_root(tmp_path / "root")


@pytest.fixture
def image_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the test an empty cache."""
    monkeypatch.setenv("METALEARN_CACHE", str(tmp_path / "cache"))


def stand_in(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Replace Omniglot's sizes and digests by those of ``make_root``, without a network."""
    for module in (omniglot, catalog, omniglot_download):
        monkeypatch.setattr(module, "OMNIGLOT_PARTS", PARTS)
    monkeypatch.setattr(omniglot, "_PIXELS_SHA256", PIXELS)
    monkeypatch.setattr(catalog, "_has_network", lambda: False)
    monkeypatch.setenv("METALEARN_CACHE", str(cache))
    monkeypatch.delenv("METALEARN_DATA", raising=False)


def make_root(root: Path) -> Path:
    """Make a folder as torchvision lays it out, in which a black square tells class and drawing."""
    number = 0
    for part, characters in (("images_background", ["A/c1", "A/c2", "B/c1"]), ("images_evaluation", ["C/c1", "D/c1"])):
        for character in characters:
            folder = root / "omniglot-py" / part / character
            folder.mkdir(parents=True)
            for drawing in range(20):
                pixels = np.full((105, 105), 255, dtype=np.uint8)
                pixels[5 * drawing : 5 * drawing + 5, 20 * number : 20 * number + 20] = 0
                Image.fromarray(pixels).convert("1").save(folder / f"{number:04}_{drawing + 1:02}.png")
            number += 1
    return root


def pack(root: Path) -> None:
    """Turn the folders into archives."""
    for part in PARTS:
        base = root / "omniglot-py"
        shutil.make_archive(str(base / part), "zip", base, part)
        shutil.rmtree(base / part)


def publish(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Publish the digests of these archives in place of the real ones."""
    digests = {part: hashlib.md5((root / "omniglot-py" / f"{part}.zip").read_bytes()).hexdigest() for part in PARTS}
    monkeypatch.setattr("torchvision.datasets.Omniglot.zips_md5", digests)
