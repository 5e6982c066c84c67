"""Omniglot is read in order, verified file by file, cached, and split without overlap."""

from __future__ import annotations

import io
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from metalearn.core.errors import DataError
from metalearn.data import metadata as catalog
from metalearn.data import omniglot
from metalearn.data.splits import ImageSplits, with_rotations

DRAWING = "images_background/A/c1/0000"


def test_images_are_white_on_black_in_sorted_order(root: Path) -> None:
    characters = omniglot.load_characters(str(root))
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


def test_second_load_uses_the_cache(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = omniglot.load_characters(str(root)).images
    monkeypatch.setattr(omniglot, "_decode", lambda drawings: pytest.fail("read again"))
    assert torch.equal(omniglot.load_characters(str(root)).images, first)


def flipped(data: bytearray) -> bytearray:
    data[data.index(b"IDAT") + 9] ^= 16
    return data


def gigantic(data: bytearray) -> bytearray:
    data[16:24] = b"\x7f\xff\xff\xff" * 2  # width and height
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return data


def encoded(mode: str, size: int, file_format: str) -> bytes:
    Image.new(mode, (size, size)).save(file := io.BytesIO(), format=file_format)
    return file.getvalue()


DAMAGES: dict[str, Callable[[bytearray], bytes | bytearray]] = {
    "truncated": lambda data: data[:-20],
    "empty": lambda data: b"",
    "flipped": flipped,
    "gigantic": gigantic,
    "other size": lambda data: encoded("1", 28, "PNG"),
    "other format": lambda data: encoded("L", 105, "JPEG"),
}


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("damage", DAMAGES)
def test_corrupt_drawing_raises(root: Path, damage: str, cached: bool) -> None:
    if cached:
        omniglot.load_characters(str(root))
    file = root / "omniglot-py/images_background/B/c1/0002_05.png"
    file.write_bytes(DAMAGES[damage](bytearray(file.read_bytes())))
    with pytest.raises(DataError, match=r"images_background/B/c1/0002_05\.png is damaged"):
        omniglot.load_characters(str(root))


def replace_by_link(file: Path) -> None:
    file.unlink()
    file.symlink_to("gone")


def replace_by_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        ("images_evaluation", shutil.rmtree, r"incomplete: the folder images_evaluation is missing"),
        ("images_evaluation/D", shutil.rmtree, r"incomplete: images_evaluation holds 1 character and not 2"),
        ("images_background/A/c2", shutil.rmtree, r"incomplete: images_background holds 2 characters and not 3"),
        (f"{DRAWING}_20.png", Path.unlink, r"incomplete: images_background/A/c1 holds 19 drawings and not 20"),
        (
            f"{DRAWING}_03.png",
            lambda p: p.rename(p.with_name("0007_03.png")),
            r"A/c1 holds 20 drawings and not 20 of one",
        ),
        (
            f"{DRAWING}_03.png",
            lambda p: shutil.copy(p, p.with_name("0000_04.png")),
            r"images_background is damaged: .*pixels are not the published ones",
        ),
        (f"{DRAWING}_03.png", replace_by_link, r"cannot be read: .*0000_03\.png"),
        (f"{DRAWING}_03.png", replace_by_pipe, r"0000_03\.png is no file"),
    ],
)
def test_incomplete_or_changed_omniglot_raises(
    root: Path, place: str, change: Callable[[Path], object], message: str
) -> None:
    change(root / "omniglot-py" / place)
    with pytest.raises(DataError, match=message):
        omniglot.load_characters(str(root))


def test_other_files_are_ignored(root: Path) -> None:
    base = root / "omniglot-py"
    (base / "images_background" / "A" / ".ipynb_checkpoints").mkdir()
    for stray in (".DS_Store", "A/.DS_Store", "A/c1/notes.txt", "A/c1/._0000_03.png", "A/c1/0000_04 (1).png"):
        (base / "images_background" / stray).touch()
    assert omniglot.load_characters(str(root)).images.shape[0] == 5


def test_name_may_be_invalid_unicode(root: Path) -> None:
    alphabet = root / "omniglot-py" / "images_evaluation" / "D"
    (alphabet / "c1").rename(alphabet / os.fsdecode(b"c1\xff"))
    assert omniglot.load_characters(str(root)).images.shape[0] == 5


def test_rotations_make_new_classes() -> None:
    images = torch.arange(2 * 1 * 4, dtype=torch.uint8).view(2, 1, 1, 2, 2)
    rotated = with_rotations(images)
    assert rotated.shape == (8, 1, 1, 2, 2)
    assert torch.equal(rotated[:2], images)
    assert rotated[2, 0, 0].tolist() == [[1, 3], [0, 2]]
    assert torch.equal(rotated[4], images[0].flip(-1, -2))


def test_either_part_is_rotated(root: Path) -> None:
    def load(*, rotations: bool = True, rotate_test: bool = False) -> ImageSplits:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(omniglot, "_classic_split", lambda: [[0, 1], [2], [3, 4]])
            return omniglot.load_omniglot(str(root), rotations=rotations, rotate_test=rotate_test)

    plain = load(rotations=False)
    assert [len(part) for part in (plain.train, plain.validation, plain.test)] == [2, 1, 2]
    for rotations, rotate_test in ((True, False), (False, True), (True, True)):
        splits = load(rotations=rotations, rotate_test=rotate_test)
        for part, rotated in (("train", rotations), ("validation", rotate_test), ("test", rotate_test)):
            expected = getattr(plain, part)
            assert torch.equal(getattr(splits, part), with_rotations(expected) if rotated else expected)
    assert torch.equal(load().train, with_rotations(plain.train)), "as in the papers"
    assert torch.equal(load().test, plain.test)


def test_metalearn_data_is_the_default(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METALEARN_DATA", str(root))
    assert omniglot.load_characters().images.shape[0] == 5
    with pytest.raises(DataError, match=r"data\.root=/nope: there is no such folder"):
        omniglot.load_characters("/nope")


def test_unknown_split_raises() -> None:
    with pytest.raises(ValueError, match=r"split='nope'; it must be one of classic, alphabets"):
        omniglot.load_omniglot(split="nope")


def test_real_omniglot(omniglot_root: str) -> None:
    characters = omniglot.load_characters(omniglot_root)
    assert characters.images.shape == (1623, 20, 1, 28, 28)
    assert len(set(characters.alphabets)) == 50
    base = Path(omniglot_root)
    base = base / "omniglot-py" if (base / "omniglot-py").is_dir() else base
    first = base / "images_background/Alphabet_of_the_Magi/character01"
    with Image.open(sorted(first.glob("*.png"))[3]) as image:
        ink = 255 - np.asarray(image.convert("L"), dtype=np.float64)
    assert characters.images[0, 3].double().mean() == pytest.approx(ink.mean(), rel=0.1)

    for split, sizes in catalog.OMNIGLOT_SPLITS.items():
        splits = omniglot.load_omniglot(omniglot_root, split=split, rotations=False)
        parts = (splits.train, splits.validation, splits.test)
        assert [len(part) for part in parts] == [sizes.train, sizes.validation, sizes.test]
        assert torch.cat(parts).flatten(1).unique(dim=0).shape[0] == 1623, "no class in two parts"
        if split == "alphabets":
            assert torch.equal(splits.test, characters.images[964:])
    assert len(omniglot.load_omniglot(omniglot_root).train) == 4400
    assert os.listdir(catalog.cache_dir())
