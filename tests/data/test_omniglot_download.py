"""Omniglot is unpacked or downloaded completely or not at all, by one run at a time."""

from __future__ import annotations

import re
import shutil
import stat
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout  # the builtin one only from Python 3.11 on
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from metalearn.core.errors import DataError
from metalearn.data import metadata as catalog
from metalearn.data import omniglot
from tests.data.conftest import PARTS, pack, publish

pytestmark = pytest.mark.usefixtures("small_omniglot")


@pytest.fixture
def packed(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pack(root)
    publish(root, monkeypatch)
    return root / "omniglot-py"


@pytest.fixture
def _network(small_omniglot: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "_has_network", lambda: True)


def test_archives_are_unpacked(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = omniglot.load_characters(str(root)).images
    pack(root)
    publish(root, monkeypatch)
    assert torch.equal(omniglot.load_characters(str(root)).images, expected)
    assert not list(root.rglob(".unpacking-*"))


def test_one_archive_of_two_is_unpacked(packed: Path) -> None:
    omniglot.load_characters(str(packed.parent))
    shutil.rmtree(packed / "images_evaluation")
    assert omniglot.load_characters(str(packed.parent)).images.shape[0] == 5


@pytest.mark.parametrize("end", [-100, -1])
def test_digest_is_compared_before_unpacking(packed: Path, monkeypatch: pytest.MonkeyPatch, end: int) -> None:
    archive = packed / "images_background.zip"
    archive.write_bytes(archive.read_bytes()[:end] + b"x")
    monkeypatch.setattr(zipfile, "ZipFile", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(DataError, match=r"images_background\.zip is damaged: its MD5 is not the published"):
        omniglot.load_characters(str(packed.parent))
    assert not (packed / "images_background").exists()


@pytest.mark.parametrize(
    "name", ["../made.png", "images_evaluation/../../made.png", "/made.png", "..\\made", "C:made", "link"]
)
def test_archive_with_members_outside_raises(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(root)
    archive = root / "omniglot-py" / "images_evaluation.zip"
    member = zipfile.ZipInfo(name)
    member.external_attr = ((stat.S_IFLNK if name == "link" else stat.S_IFREG) | 0o777) << 16
    with zipfile.ZipFile(archive, "a") as opened:
        opened.writestr(member, "/etc")
    publish(root, monkeypatch)
    with pytest.raises(
        DataError, match=rf"images_evaluation\.zip is not unpacked: its member '{re.escape(repr(name)[1:-1])}'"
    ):
        omniglot.load_characters(str(root))
    assert not (root / "omniglot-py" / "images_evaluation").exists()
    assert not list(root.parent.rglob("made*"))


@pytest.mark.usefixtures("_network")
def test_torchvision_compares_digest_before_unpacking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(url: str, filename: str, **_: object) -> None:
        Path(filename).write_bytes(b"not the archive")

    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, **_: url)
    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", wrong)
    monkeypatch.setattr("torchvision.datasets.utils.extract_archive", lambda *_, **__: pytest.fail("unpacked"))
    with pytest.raises(DataError, match=r"could not be saved in .*File not found or corrupted"):
        omniglot.load_characters(str(tmp_path))


def test_interrupted_unpacking_leaves_nothing(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(archive: str, to: str) -> None:
        (Path(to) / "images_background" / "A").mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr("torchvision.datasets.utils.extract_archive", half)
    with pytest.raises(KeyboardInterrupt):
        omniglot.load_characters(str(packed.parent))
    assert sorted(p.name for p in packed.iterdir()) == [f"{part}.zip" for part in sorted(PARTS)]


def fake_download(root: Path) -> Callable[..., None]:
    """Torchvision's class, which copies instead."""

    def download(to: str, *, background: bool, download: bool) -> None:
        part = "images_background" if background else "images_evaluation"
        shutil.copytree(root / "omniglot-py" / part, Path(to) / "omniglot-py" / part)

    return download


@pytest.mark.usefixtures("_network")
def test_download_fills_the_default_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.datasets.Omniglot", fake_download(root))
    assert omniglot.load_characters(None).images.shape[0] == 5
    assert sorted(p.name for p in (catalog.cache_dir() / "data" / "omniglot-py").iterdir()) == sorted(PARTS)


@pytest.mark.usefixtures("_network")
def test_concurrent_run_waits_and_does_not_download(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchvision.datasets.Omniglot", lambda *_, **__: pytest.fail("downloaded again"))
    here = tmp_path / "shared"
    here.mkdir()
    with ThreadPoolExecutor() as pool, FileLock(here / ".omniglot.lock"):
        waiting = pool.submit(omniglot.load_characters, str(here))
        with pytest.raises(FutureTimeout):
            waiting.result(timeout=0.5)
        shutil.copytree(root / "omniglot-py", here / "omniglot-py")
    assert waiting.result(timeout=30).images.shape[0] == 5


@pytest.mark.usefixtures("_network")
def test_failed_download_raises_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(to: str, *, background: bool, download: bool) -> None:
        (Path(to) / "omniglot-py" / "images_background").mkdir(parents=True)
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr("torchvision.datasets.Omniglot", fails)
    with pytest.raises(DataError, match=r"could not be saved in .*File not found or corrupted.*data=glyphs"):
        omniglot.load_characters(str(tmp_path))
    assert not list(tmp_path.rglob("images_background"))
