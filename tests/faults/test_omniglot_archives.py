"""Omniglot that is incomplete: archives damaged, cut, reaching outside or a class short, and half an unpacking."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from metalearn.core.errors import DataError
from metalearn.data import omniglot
from tests.data.conftest import PARTS, make_root, pack, publish, stand_in
from tests.faults.cases import cases


def archive_in(root: Path) -> Path:
    return root / "omniglot-py" / "images_evaluation.zip"


def flip_bit(root: Path) -> str:
    """Flip a bit after the digests were published."""
    archive = archive_in(root)
    data = bytearray(archive.read_bytes())
    data[len(data) // 2] ^= 1
    archive.write_bytes(data)
    return r"images_evaluation\.zip is damaged: its MD5 is not the published .*Remove it and run again"


def cut(root: Path) -> str:
    archive = archive_in(root)
    archive.write_bytes(archive.read_bytes()[:-200])
    return r"images_evaluation\.zip is damaged: its MD5 is not the published .*Remove it and run again"


def add_member_outside(root: Path) -> str:
    with zipfile.ZipFile(archive_in(root), "a") as opened:
        opened.writestr("images_evaluation/../../../outside.png", b"here")
    return r"images_evaluation\.zip is not unpacked: its member '\S*\.\./outside\.png'.*Remove the archive"


def unpack_half(root: Path) -> str:
    """Leave the folder of a killed extraction, and half of a copy."""
    base = root / "omniglot-py"
    with zipfile.ZipFile(archive_in(root)) as opened:
        half = [name for name in opened.namelist() if name.startswith("images_evaluation/C")]
        opened.extractall(base / ".unpacking-killed", half)
        opened.extractall(base, half)
    return r"omniglot-py is incomplete: images_evaluation holds 1 characters and not 2.*Remove that folder"


def drop_class(root: Path) -> str:
    with zipfile.ZipFile(archive_in(root)) as opened:
        kept = {name: opened.read(name) for name in opened.namelist() if not name.startswith("images_evaluation/D")}
    with zipfile.ZipFile(archive_in(root), "w") as opened:
        for name, content in kept.items():
            opened.writestr(name, content)
    return r"omniglot-py is incomplete: images_evaluation holds 1 characters and not 2.*Remove that folder"


@pytest.mark.fault(
    "Omniglot archive corrupt, cut, with `../` members, half-extracted, one class short",
    "detected, repaired or refused",
)
@pytest.mark.parametrize("damage", cases([flip_bit, cut, add_member_outside, unpack_half, drop_class], quick=range(5)))
def test_damaged_archive(damage: Callable[[Path], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "inside"
    root = make_root(inside / "root")
    stand_in(monkeypatch, inside / "cache")
    images = omniglot.load_characters(str(root)).images
    pack(root)
    publish(root, monkeypatch)
    intact = {part: (root / "omniglot-py" / f"{part}.zip").read_bytes() for part in PARTS}
    message = damage(root)
    if damage not in (flip_bit, cut):  # the others are as they were published
        publish(root, monkeypatch)
    with pytest.raises(DataError, match=message) as raised:
        omniglot.load_characters(str(root))
    assert str(root) in str(raised.value), "the message says where"
    assert [p.name for p in tmp_path.iterdir()] == ["inside"], "something was written outside"
    assert not list(inside.rglob("outside*")), "something was written outside"
    assert {p.name for p in (root / "omniglot-py").glob(".unpacking-*")} <= {".unpacking-killed"}

    # The remedy of the messages: remove the folder, and copy the archives again.
    shutil.rmtree(root / "omniglot-py")
    (root / "omniglot-py").mkdir()
    for part, content in intact.items():
        (root / "omniglot-py" / f"{part}.zip").write_bytes(content)
    publish(root, monkeypatch)
    assert torch.equal(omniglot.load_characters(str(root)).images, images)
