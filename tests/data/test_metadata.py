"""Sizes of the data sets, and the source of Omniglot, without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from metalearn.core.errors import DataError
from metalearn.data import metadata as catalog
from metalearn.data.metadata import glyph_split_sizes, omniglot_source, resolve_dataset


@pytest.fixture(autouse=True)
def _no_network_and_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "_has_network", lambda: False)
    monkeypatch.delenv("METALEARN_DATA", raising=False)


def test_metadata_imports_no_torch() -> None:
    code = "import sys, metalearn, metalearn.config.compose, metalearn.data.metadata; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_url_equals_torchvisions() -> None:
    from torchvision.datasets import Omniglot

    assert Omniglot.download_url_prefix == catalog.OMNIGLOT_URL


@pytest.mark.parametrize("classes", [20, 33, 1000])
def test_glyph_splits_use_every_class(classes: int) -> None:
    sizes = glyph_split_sizes(classes)
    assert sizes.train + sizes.validation + sizes.test == classes
    assert sizes.smallest >= 2


def test_archives_need_no_network(tmp_path: Path) -> None:
    (tmp_path / "omniglot-py").mkdir()
    for part in catalog.OMNIGLOT_PARTS:
        (tmp_path / "omniglot-py" / f"{part}.zip").touch()
    assert omniglot_source(str(tmp_path)) == "archives"
    (tmp_path / "omniglot-py" / "images_background").mkdir()
    assert omniglot_source(str(tmp_path)) == "archives", "one of the two is still packed"
    (tmp_path / "omniglot-py" / "images_evaluation").mkdir()
    assert omniglot_source(str(tmp_path)) == omniglot_source(str(tmp_path / "omniglot-py")) == "disk"


def test_download_needs_an_existing_or_the_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "_has_network", lambda: True)
    assert omniglot_source(str(tmp_path)) == "download"
    assert omniglot_source(None) == "download"
    with pytest.raises(DataError, match="no such folder"):
        omniglot_source(str(tmp_path / "typo"))


def test_fallback_takes_the_place_of_the_default_folder_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_dataset("omniglot", None, "glyphs") == "glyphs"
    assert resolve_dataset("glyphs", None, None) == "glyphs"
    ways = r"[\s\S]*Three ways out[\s\S]*data\.root=[\s\S]*a network[\s\S]*data=glyphs"
    with pytest.raises(DataError, match=f"holds no Omniglot{ways}"):
        resolve_dataset("omniglot", None, None)
    with pytest.raises(DataError, match=rf"data\.root={tmp_path}: this folder holds no Omniglot{ways}"):
        resolve_dataset("omniglot", str(tmp_path), "glyphs")
    with pytest.raises(DataError, match=rf"data\.root={tmp_path}/typo: there is no such folder{ways}"):
        resolve_dataset("omniglot", f"{tmp_path}/typo", "glyphs")
    monkeypatch.setenv("METALEARN_DATA", f"{tmp_path}/typo")
    for root in (None, f"{tmp_path}/typo"):  # as the configuration takes it from the environment
        with pytest.raises(DataError, match=f"METALEARN_DATA={tmp_path}/typo: there is no such folder{ways}"):
            resolve_dataset("omniglot", root, "glyphs")
    with pytest.raises(DataError, match=r"data\.root=/nope: there is no such folder"):
        resolve_dataset("omniglot", "/nope", "glyphs")
