"""Omniglot that is not whole: archives damaged, cut, reaching outside or a class short, and halves of an unpacking."""

from __future__ import annotations

import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from metalearn.core.errors import DataError
from metalearn.data import omniglot
from tests.data.conftest import PARTS, make_root, pack, publish, stand_in
from tests.faults.suite import Row


def _damaged(root: Path) -> str:
    """A bit is flipped after the digests were published."""
    archive = _archive(root)
    data = bytearray(archive.read_bytes())
    data[len(data) // 2] ^= 1
    archive.write_bytes(data)
    return r"images_evaluation\.zip is damaged: its MD5 is not the published .*Remove it and run again"


def _cut(root: Path) -> str:
    archive = _archive(root)
    archive.write_bytes(archive.read_bytes()[:-200])
    return r"images_evaluation\.zip is damaged: its MD5 is not the published .*Remove it and run again"


def _climbing(root: Path) -> str:
    with zipfile.ZipFile(_archive(root), "a") as opened:
        opened.writestr("images_evaluation/../../../outside.png", b"here")
    return r"images_evaluation\.zip is not unpacked: its member '\S*\.\./outside\.png'.*Remove the archive"


def _half_unpacked(root: Path) -> str:
    """A killed extraction left its folder, and a copy that broke off half of a part's."""
    base = root / "omniglot-py"
    with zipfile.ZipFile(_archive(root)) as opened:
        half = [name for name in opened.namelist() if name.startswith("images_evaluation/C")]
        opened.extractall(base / ".unpacking-killed", half)
        opened.extractall(base, half)
    return r"omniglot-py is incomplete: images_evaluation holds 1 characters and not 2.*Remove that folder"


def _one_class_short(root: Path) -> str:
    with zipfile.ZipFile(_archive(root)) as opened:
        kept = {name: opened.read(name) for name in opened.namelist() if not name.startswith("images_evaluation/D")}
    with zipfile.ZipFile(_archive(root), "w") as opened:
        for name, content in kept.items():
            opened.writestr(name, content)
    return r"omniglot-py is incomplete: images_evaluation holds 1 characters and not 2.*Remove that folder"


_FAULTS: list[tuple[Callable[[Path], str], bool]] = [
    (_damaged, False),
    (_cut, False),
    (_climbing, True),
    (_half_unpacked, True),
    (_one_class_short, True),
]
"""What is done to the archives, and whether the digests that count are those of afterwards."""


def _archive(root: Path) -> Path:
    return root / "omniglot-py" / "images_evaluation.zip"


def _attempt(i: int, folder: Path, shared: Path) -> None:
    damage, published_afterwards = _FAULTS[i]
    inside = folder / "inside"
    root = make_root(inside / "root")
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch, inside / "cache")
        whole = omniglot.load_characters(str(root)).images
        pack(root)
        publish(root, patch)
        sound = {part: (root / "omniglot-py" / f"{part}.zip").read_bytes() for part in PARTS}
        named = damage(root)
        if published_afterwards:
            publish(root, patch)
        _refused(root, named)
        assert [p.name for p in folder.iterdir()] == ["inside"], "something was written outside"
        assert not list(inside.rglob("outside*")), "something was written outside"
        (left,) = {p.name for p in (root / "omniglot-py").glob(".unpacking-*")} or {"none"}
        assert left in ("none", ".unpacking-killed"), f"{left} was left behind"
        _mend(root, sound)
        publish(root, patch)
        assert torch.equal(omniglot.load_characters(str(root)).images, whole), "the remedy does not help"


def _refused(root: Path, named: str) -> None:
    said = ""
    try:
        omniglot.load_characters(str(root))
    except DataError as error:
        said = str(error)
    assert said, "it was taken for whole"
    assert re.search(named, said), f"the message names too little: {said}"
    assert str(root) in said, f"the message does not say where: {said}"


def _mend(root: Path, sound: dict[str, bytes]) -> None:
    """As the messages say: remove the folder, and copy the archives anew."""
    shutil.rmtree(root / "omniglot-py")
    (root / "omniglot-py").mkdir()
    for part, content in sound.items():
        (root / "omniglot-py" / f"{part}.zip").write_bytes(content)


ARCHIVES = Row(
    name="archives",
    fault="Omniglot archive corrupt, cut, with `../` members, half-extracted, one class short",
    must_hold="detected, repaired or refused",
    tries=len(_FAULTS),
    attempt=_attempt,
    short=range(len(_FAULTS)),
    seconds=0.5,
)
