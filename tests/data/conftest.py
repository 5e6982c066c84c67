"""A small Omniglot that stands for the real one."""

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
    """Five classes stand for the 1,623, without a network and with a cache of their own."""
    stand_in(monkeypatch, tmp_path / "own cache")


@pytest.fixture
def root(small_omniglot: None, tmp_path: Path) -> Path:
    """A folder as torchvision lays it out; each image has a black square whose place tells class and drawing."""
    return make_root(tmp_path / "root")


def stand_in(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """As ``small_omniglot``."""
    for module in (omniglot, catalog, omniglot_download):
        monkeypatch.setattr(module, "OMNIGLOT_PARTS", PARTS)
    monkeypatch.setattr(omniglot, "_PIXELS_SHA256", PIXELS)
    monkeypatch.setattr(catalog, "_reachable", lambda: False)
    monkeypatch.setenv("METALEARN_CACHE", str(cache))


def make_root(root: Path) -> Path:
    """As ``root``."""
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
    """Take the digests of the archives that lie there for the published ones."""
    digests = {part: hashlib.md5((root / "omniglot-py" / f"{part}.zip").read_bytes()).hexdigest() for part in PARTS}
    monkeypatch.setattr("torchvision.datasets.Omniglot.zips_md5", digests)
