"""Omniglot is read in order, verified file by file, cached, and split without overlap."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout  # the builtin one only from Python 3.11 on
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from metalearn.data import catalog, omniglot, omniglot_download
from metalearn.data.splits import with_rotations
from metalearn.errors import DataError

PIXELS = {
    "images_background": "a90972222e6da451049dbf89c759b11589db2d9eff9365c33fcbe6be6d2f9188",
    "images_evaluation": "b5c12022fe2fc72d9cdc0b9451cd636578d58a3ddae0d03c4924404d11e8baad",
}
PARTS = {"images_background": 3, "images_evaluation": 2}


@pytest.fixture(autouse=True)
def _small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Five classes stand for the 1,623, with a cache of their own."""
    if "omniglot_root" not in request.fixturenames:
        for module in (omniglot, catalog, omniglot_download):
            monkeypatch.setattr(module, "OMNIGLOT_PARTS", PARTS)
        monkeypatch.setattr(omniglot, "_PIXELS_SHA256", PIXELS)
        monkeypatch.setattr(catalog, "_reachable", lambda: False)
        monkeypatch.setenv("METALEARN_CACHE", str(tmp_path / "own cache"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder as torchvision lays it out; each image has a black square whose place tells class and drawing."""
    number = 0
    for part, characters in (("images_background", ["A/c1", "A/c2", "B/c1"]), ("images_evaluation", ["C/c1", "D/c1"])):
        for character in characters:
            folder = tmp_path / "root" / "omniglot-py" / part / character
            folder.mkdir(parents=True)
            for drawing in range(20):
                pixels = np.full((105, 105), 255, dtype=np.uint8)
                pixels[5 * drawing : 5 * drawing + 5, 20 * number : 20 * number + 20] = 0
                Image.fromarray(pixels).convert("1").save(folder / f"{number:04}_{drawing + 1:02}.png")
            number += 1
    return tmp_path / "root"


def test_images_are_white_on_black_in_sorted_order(root: Path) -> None:
    characters = omniglot.read_characters(str(root))
    assert characters.images.shape == (5, 20, 1, 28, 28)
    assert characters.images.dtype == torch.uint8
    assert characters.alphabets == ["A", "A", "B", "C", "D"]
    assert characters.parts == ["images_background"] * 3 + ["images_evaluation"] * 2
    for number in range(5):
        for drawing in (0, 19):
            image = characters.images[number, drawing, 0].float()
            row, column = (image.sum(dim=1 - axis).argmax().item() for axis in (0, 1))
            assert row == pytest.approx((5 * drawing + 2) * 28 / 105, abs=1)
            assert column == pytest.approx((20 * number + 10) * 28 / 105, abs=3)
            assert image.max() > 100
            assert image.median() == 0


def test_second_reading_comes_from_the_cache(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = omniglot.read_characters(str(root)).images
    monkeypatch.setattr(omniglot, "_decode", lambda drawings: pytest.fail("read again"))
    assert torch.equal(omniglot.read_characters(str(root)).images, first)


def test_damaged_cache_is_made_anew(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = omniglot.read_characters(str(root)).images
    (cached,) = catalog.cache_dir().glob("*.pt")
    data = bytearray(cached.read_bytes())
    data[len(data) // 2] ^= 1
    cached.write_bytes(data)
    assert torch.equal(omniglot.read_characters(str(root)).images, first)
    assert "is damaged" in caplog.text


def test_unwritable_cache_is_no_obstacle(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setenv("METALEARN_CACHE", str(tmp_path / "a file" / "below"))
    assert omniglot.read_characters(str(root)).images.shape[0] == 5


def test_a_change_after_caching_is_noticed(root: Path) -> None:
    omniglot.read_characters(str(root))
    victim = root / "omniglot-py/images_background/A/c1/0000_07.png"
    victim.write_bytes(victim.read_bytes()[:60])
    with pytest.raises(DataError, match=r"0000_07\.png is damaged"):
        omniglot.read_characters(str(root))


def _truncate(base: Path) -> None:
    file = base / "images_background/B/c1/0002_05.png"
    file.write_bytes(file.read_bytes()[:-20])


def _empty(base: Path) -> None:
    (base / "images_background/B/c1/0002_05.png").write_bytes(b"")


def _flip(base: Path) -> None:
    file = base / "images_background/B/c1/0002_05.png"
    data = bytearray(file.read_bytes())
    data[data.index(b"IDAT") + 9] ^= 16
    file.write_bytes(data)


def _other_size(base: Path) -> None:
    Image.new("1", (28, 28)).save(base / "images_background/B/c1/0002_05.png")


@pytest.mark.parametrize("damage", [_truncate, _empty, _flip, _other_size])
def test_damaged_files_are_named(root: Path, damage: object) -> None:
    damage(root / "omniglot-py")  # type: ignore[operator]
    with pytest.raises(DataError, match=r"images_background/B/c1/0002_05\.png is damaged"):
        omniglot.read_characters(str(root))


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("images_evaluation", r"incomplete: the folder images_evaluation is missing"),
        ("images_evaluation/D", r"incomplete: images_evaluation holds 1 characters and not 2"),
        ("images_background/A/c2", r"incomplete: images_background holds 2 characters and not 3"),
        ("images_background/A/c2/0001_20.png", r"incomplete: images_background/A/c2 holds 19 drawings and not 20"),
    ],
)
def test_incomplete_folders_are_named(root: Path, missing: str, message: str) -> None:
    path = root / "omniglot-py" / missing
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    with pytest.raises(DataError, match=message):
        omniglot.read_characters(str(root))


def test_stray_files_do_not_matter(root: Path) -> None:
    base = root / "omniglot-py"
    (base / "images_background" / "A" / ".ipynb_checkpoints").mkdir()
    for stray in (".DS_Store", "A/.DS_Store", "A/c1/notes.txt", "A/c1/._0000_03.png", "A/c1/0000_04 (1).png"):
        (base / "images_background" / stray).touch()
    assert omniglot.read_characters(str(root)).images.shape[0] == 5


def test_other_pixels_than_the_published_ones_are_noticed(root: Path) -> None:
    base = root / "omniglot-py" / "images_background"
    shutil.copy(base / "A/c1/0000_03.png", base / "A/c1/0000_04.png")
    with pytest.raises(DataError, match=r"images_background is damaged: .*pixels are not the published ones"):
        omniglot.read_characters(str(root))


def test_names_that_do_not_belong_are_noticed(root: Path) -> None:
    folder = root / "omniglot-py" / "images_background" / "A" / "c1"
    (folder / "0000_03.png").rename(folder / "0007_03.png")
    with pytest.raises(DataError, match=r"A/c1 holds 20 drawings and not 20 of one number"):
        omniglot.read_characters(str(root))


def test_a_link_to_nowhere_is_named(root: Path) -> None:
    file = root / "omniglot-py" / "images_background" / "A" / "c1" / "0000_03.png"
    file.unlink()
    file.symlink_to(root / "gone")
    with pytest.raises(DataError, match=r"cannot be read: .*0000_03\.png"):
        omniglot.read_characters(str(root))


def pack(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn the folders into archives, whose digests are then the published ones."""
    digests = {}
    for part in PARTS:
        base = root / "omniglot-py"
        archive = Path(shutil.make_archive(str(base / part), "zip", base, part))
        digests[part] = hashlib.md5(archive.read_bytes()).hexdigest()
        shutil.rmtree(base / part)
    monkeypatch.setattr("torchvision.datasets.Omniglot.zips_md5", digests)


def test_archives_without_folders_are_unpacked(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = omniglot.read_characters(str(root)).images
    pack(root, monkeypatch)
    assert torch.equal(omniglot.read_characters(str(root)).images, expected)
    assert not list(root.rglob(".unpacking-*"))


def test_one_archive_of_two_is_unpacked(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(root, monkeypatch)
    omniglot.read_characters(str(root))
    shutil.rmtree(root / "omniglot-py" / "images_evaluation")
    assert omniglot.read_characters(str(root)).images.shape[0] == 5


def test_damaged_archive_is_named_and_not_unpacked(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(root, monkeypatch)
    archive = root / "omniglot-py" / "images_evaluation.zip"
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"images_evaluation\.zip is damaged: its MD5 is not the published"):
        omniglot.read_characters(str(root))
    assert not (root / "omniglot-py" / "images_evaluation").exists()


def test_interrupted_unpacking_leaves_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(root, monkeypatch)

    def half(archive: str, to: str) -> None:
        (Path(to) / "images_background" / "A").mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr("torchvision.datasets.utils.extract_archive", half)
    with pytest.raises(KeyboardInterrupt):
        omniglot.read_characters(str(root))
    assert sorted(p.name for p in (root / "omniglot-py").iterdir()) == [f"{part}.zip" for part in sorted(PARTS)]


def fake_download(root: Path) -> Callable[..., None]:
    """Torchvision's class, which copies instead."""

    def download(to: str, *, background: bool, download: bool) -> None:
        part = "images_background" if background else "images_evaluation"
        shutil.copytree(root / "omniglot-py" / part, Path(to) / "omniglot-py" / part)

    return download


def test_download_fills_the_default_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "_reachable", lambda: True)
    monkeypatch.setattr("torchvision.datasets.Omniglot", fake_download(root))
    assert omniglot.read_characters(None).images.shape[0] == 5
    assert sorted(p.name for p in (catalog.cache_dir() / "data" / "omniglot-py").iterdir()) == sorted(PARTS)


def test_a_run_that_starts_meanwhile_waits_and_downloads_nothing(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "_reachable", lambda: True)
    monkeypatch.setattr("torchvision.datasets.Omniglot", lambda *_, **__: pytest.fail("downloaded again"))
    here = tmp_path / "shared"
    here.mkdir()
    with ThreadPoolExecutor() as pool, FileLock(here / ".omniglot.lock"):
        waiting = pool.submit(omniglot.read_characters, str(here))
        with pytest.raises(FutureTimeout):
            waiting.result(timeout=0.5)
        shutil.copytree(root / "omniglot-py", here / "omniglot-py")
    assert waiting.result(timeout=30).images.shape[0] == 5


def test_failed_download_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(to: str, *, background: bool, download: bool) -> None:
        (Path(to) / "omniglot-py" / "images_background").mkdir(parents=True)
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr(catalog, "_reachable", lambda: True)
    monkeypatch.setattr("torchvision.datasets.Omniglot", fails)
    with pytest.raises(DataError, match=r"could not be brought to .*File not found or corrupted.*data=glyphs"):
        omniglot.read_characters(str(tmp_path))
    assert not list(tmp_path.rglob("images_background"))


def test_rotations_make_new_classes() -> None:
    images = torch.arange(2 * 1 * 4, dtype=torch.uint8).view(2, 1, 1, 2, 2)
    rotated = with_rotations(images)
    assert rotated.shape == (8, 1, 1, 2, 2)
    assert torch.equal(rotated[:2], images)
    assert rotated[2, 0, 0].tolist() == [[1, 3], [0, 2]]
    assert torch.equal(rotated[4], images[0].flip(-1, -2))


def test_unknown_split_is_named() -> None:
    with pytest.raises(ValueError, match=r"split='nope'; it must be one of classic, alphabets"):
        omniglot.omniglot(split="nope")


def test_the_real_one(omniglot_root: str) -> None:
    characters = omniglot.read_characters(omniglot_root)
    assert characters.images.shape == (1623, 20, 1, 28, 28)
    assert len(set(characters.alphabets)) == 50
    base = Path(omniglot_root)
    base = base / "omniglot-py" if (base / "omniglot-py").is_dir() else base
    first = base / "images_background/Alphabet_of_the_Magi/character01"
    with Image.open(sorted(first.glob("*.png"))[3]) as image:
        ink = 255 - np.asarray(image.convert("L"), dtype=np.float64)
    assert characters.images[0, 3].double().mean() == pytest.approx(ink.mean(), rel=0.1)

    for split, sizes in catalog.OMNIGLOT_SPLITS.items():
        splits = omniglot.omniglot(omniglot_root, split=split, rotations=False)
        parts = (splits.train, splits.validation, splits.test)
        assert [len(part) for part in parts] == [sizes.train, sizes.validation, sizes.test]
        assert torch.cat(parts).flatten(1).unique(dim=0).shape[0] == 1623, "no class in two parts"
        if split == "alphabets":
            assert torch.equal(splits.test, characters.images[964:])
    assert len(omniglot.omniglot(omniglot_root).train) == 4400
    assert os.listdir(catalog.cache_dir())
