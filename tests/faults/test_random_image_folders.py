"""Damaged Omniglot: archives and half an unpacking, and folders of drawings with random damage."""

from __future__ import annotations

import os
import random
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from PIL import Image

from metalearn.core.errors import DataError
from metalearn.data import omniglot
from tests.data.conftest import PARTS, make_root, pack, publish, stand_in
from tests.faults.cases import cases, check_random_cases


def archive_in(root: Path) -> Path:
    return root / "omniglot-py" / "images_evaluation.zip"


def flip_bit_of_archive(root: Path) -> str:
    """Flip a bit after the digests were published."""
    archive = archive_in(root)
    flip_bit(archive, 8 * (archive.stat().st_size // 2))
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
    return r"omniglot-py is incomplete: images_evaluation holds 1 character and not 2.*Remove that folder"


def drop_class(root: Path) -> str:
    with zipfile.ZipFile(archive_in(root)) as opened:
        kept = {name: opened.read(name) for name in opened.namelist() if not name.startswith("images_evaluation/D")}
    with zipfile.ZipFile(archive_in(root), "w") as opened:
        for name, content in kept.items():
            opened.writestr(name, content)
    return r"omniglot-py is incomplete: images_evaluation holds 1 character and not 2.*Remove that folder"


DAMAGES = [flip_bit_of_archive, cut, add_member_outside, unpack_half, drop_class]


@pytest.mark.fault(
    "Omniglot archive corrupt, cut, with `../` members, half-extracted, one class short",
    "detected, repaired or refused",
)
@pytest.mark.parametrize("damage", cases(DAMAGES, quick=range(5)))
def test_damaged_archive(damage: Callable[[Path], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "inside"
    root = make_root(inside / "root")
    stand_in(monkeypatch, inside / "cache")
    images = omniglot.load_characters(str(root)).images
    pack(root)
    publish(root, monkeypatch)
    intact = {part: (root / "omniglot-py" / f"{part}.zip").read_bytes() for part in PARTS}
    message = damage(root)
    if damage not in (flip_bit_of_archive, cut):  # the others are as they were published
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


Damage = Callable[[Path, int], object]
"""``damage(path, n)`` damages one path in a way that depends on the number."""


def flip_bit(file: Path, n: int) -> None:
    data = bytearray(file.read_bytes())
    data[n // 8 % len(data)] ^= 1 << n % 8
    file.write_bytes(data)


def change_size_in_header(file: Path, n: int) -> None:
    """Write another width and height, up to 2^31, with a valid checksum."""
    data = bytearray(file.read_bytes())
    data[16:24] = struct.pack(">II", *(((1, 20_000), (9_000, 12_000), (2**31 - 1, 2**31 - 1), (0, 0))[n % 4]))
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    file.write_bytes(data)


def replace_by_link(to: str) -> Damage:
    def damage(path: Path, n: int) -> None:
        target = path.parent / to if to else path
        remove(path, n)
        path.symlink_to(target)

    return damage


def move_and_link(path: Path, n: int) -> None:
    elsewhere = path.with_name(".moved")
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def remove(path: Path, n: int) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def exchange(path: Path, n: int) -> None:
    path.lstat()  # there must be one
    others = sorted(other for other in path.parent.iterdir() if other.is_dir() == path.is_dir())
    other, aside = others[n % len(others)], path.with_name("aside")
    if other != path:
        path.rename(aside)
        other.rename(path)
        aside.rename(other)


def convert(mode: str) -> Damage:
    def damage(file: Path, n: int) -> None:
        with Image.open(file) as image:
            other = image.convert(mode)
        other.save(file, format="PNG")

    return damage


def replace_by_folder(file: Path, n: int) -> None:
    file.unlink()
    file.mkdir()


def replace_by_pipe(file: Path, n: int) -> None:
    file.unlink()
    os.mkfifo(file)


def copy(path: Path, n: int) -> None:
    target = path.with_name(NAMES[n % len(NAMES)])
    shutil.copytree(path, target) if path.is_dir() else shutil.copy2(path, target)


NAMES = ["0000_21.png", "0000_01.PNG", "9999_01.png", "c9", ".hidden", "x.txt", "Ä 日本", "a\nb", "\udcff.png"]
NAMES.append("n" * 250)
OF_FILES: dict[str, Damage] = {
    "flipped": flip_bit,
    "shortened": lambda file, n: file.write_bytes(file.read_bytes()[: n % 200]),
    "noise": lambda file, n: file.write_bytes(random.Random(n).randbytes(n % 500)),
    "text": lambda file, n: file.write_text("<html>404</html>\n"),
    "longer": lambda file, n: file.write_bytes(file.read_bytes() + b"\0" * (n % 99)),
    "another header": change_size_in_header,
    "another size": lambda file, n: Image.new("1", (n % 300 + 1, 105)).save(file),
    "empty drawing": lambda file, n: Image.new("1", (105, 105)).save(file),
    "a JPEG": lambda file, n: Image.new("L", (105, 105)).save(file, format="JPEG"),
    "grey": convert("L"),
    "coloured": convert("RGBA"),
    "palette": convert("P"),
    "a folder": replace_by_folder,
    "a pipe": replace_by_pipe,
}
OF_BOTH: dict[str, Damage] = {
    "removed": remove,
    "renamed": lambda path, n: path.rename(path.with_name(NAMES[n % len(NAMES)])),
    "copied": copy,
    "exchanged": exchange,
    "a link to nowhere": replace_by_link("nowhere"),
    "a link to itself": replace_by_link(""),
    "a link to its folder": replace_by_link("."),
    "moved and linked": move_and_link,
    "closed": lambda path, n: path.chmod(0),
    "touched": lambda path, n: os.utime(path, (n, n)),
}
OF_FOLDERS: dict[str, Damage] = {
    "a file beside": lambda folder, n: (folder / NAMES[n % len(NAMES)]).touch(),
    "a folder beside": lambda folder, n: (folder / NAMES[n % len(NAMES)]).mkdir(),
    "an archive": lambda folder, n: (folder / "images_background.zip").write_bytes(random.Random(n).randbytes(n % 50)),
}


FILES = [
    *(f"images_background/A/c1/0000_{n:02}.png" for n in (1, 2, 20)),
    *(f"images_background/B/c1/0002_{n:02}.png" for n in (1, 7)),
    *(f"images_evaluation/D/c1/0004_{n:02}.png" for n in (3, 20)),
]
FOLDERS = ["images_background", "images_evaluation", "images_background/A", "images_background/A/c2"]
FOLDERS += ["images_evaluation/D", "images_evaluation/D/c1", "."]


@dataclass(frozen=True)
class Case:
    """Damages with their places and numbers, and whether the folder was read before."""

    damages: tuple[tuple[str, str, int], ...]
    cached: bool


def damaged_folders() -> st.SearchStrategy[Case]:
    number = st.integers(0, 10**6)
    of_files = st.tuples(st.sampled_from([*OF_FILES, *OF_BOTH]), st.sampled_from(FILES), number)
    of_folders = st.tuples(st.sampled_from([*OF_FOLDERS, *OF_BOTH]), st.sampled_from(FOLDERS), number)
    damages = st.lists(st.one_of(of_files, of_files, of_folders), min_size=1, max_size=3)
    return st.builds(Case, damages=damages.map(tuple), cached=st.booleans())


def damage_folder(base: Path, case: Case) -> bool:
    """Return whether all damages could be done: one may leave nothing for the next."""
    try:
        for name, place, n in case.damages:
            (OF_FILES | OF_BOTH | OF_FOLDERS)[name](base / place, n)
    except (OSError, shutil.Error):
        return False
    return True


@pytest.mark.fault(
    "a folder of images with up to three damages at random: in files, links, names and folders",
    "the same images, or a `DataError` that names the folder",
    cases=20,
)
@pytest.mark.parametrize("number", cases(range(10), quick=[0]))
@pytest.mark.filterwarnings("error")  # Pillow's, of the sizes that headers claim
def test_random_image_folders(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, tmp_path / "cache")
    intact = make_root(tmp_path / "intact")
    images = omniglot.load_characters(str(intact)).images
    root = tmp_path / "root"

    def check(case: Case) -> None:
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(intact, root)
        monkeypatch.setenv("METALEARN_CACHE", str((tmp_path if case.cached else root) / "cache"))
        if not damage_folder(root / "omniglot-py", case):
            return
        try:
            loaded = omniglot.load_characters(str(root)).images
        except DataError as error:
            if str(root) not in str(error):
                raise AssertionError(f"names no place in {root}: {error}") from error
        else:
            assert torch.equal(loaded, images)

    check_random_cases(damaged_folders(), check, n=20, number=number)
