"""Files are written completely or not at all, and corruption is noticed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
from pathlib import Path

import pytest
import torch

from metalearn.core import serialization as files


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return the path of a file of ``save_checked``."""
    files.save_checked({"n": 1}, tmp_path / "a.pt")
    return tmp_path / "a.pt"


def test_round_trip(tmp_path: Path) -> None:
    content = {"w": torch.randn(3), "n": 1, "name": "x", "list": [1.5, None]}
    files.save_checked(content, tmp_path / "sub" / "a.pt")
    loaded = files.load_checked(tmp_path / "sub" / "a.pt")
    assert torch.equal(loaded.pop("w"), content.pop("w"))  # type: ignore[arg-type]
    assert loaded == content


def test_load_checked_raises_on_flipped_bits(path: Path) -> None:
    files.save_checked({"w": torch.randn(16)}, path)
    data = path.read_bytes()
    for position in range(0, len(data), 37):
        damaged = bytearray(data)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        with pytest.raises(files.CorruptFileError, match="its SHA-256 differs"):
            files.load_checked(path)


@pytest.mark.parametrize("writes_before", [0, 1, 2])
def test_interrupted_save_leaves_a_readable_file(
    path: Path, monkeypatch: pytest.MonkeyPatch, writes_before: int
) -> None:
    outcomes = iter([os.replace] * writes_before)
    monkeypatch.setattr(os, "replace", lambda *paths: next(outcomes)(*paths))
    with pytest.raises(StopIteration):
        files.save_checked({"n": 2}, path)
    assert files.load_checked(path) == {"n": 2 if writes_before == 2 else 1}
    monkeypatch.undo()
    files.save_checked({"n": 3}, path)
    assert files.load_checked(path) == {"n": 3}
    assert len(path.with_name("a.pt.sha256").read_bytes().split()) == 1


def test_file_replaced_while_read_is_read_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, turn = Path.read_bytes, [0]

    def read_then_replaced(self: Path) -> bytes:
        data = read(self)
        if self == path and turn[0] == 0:
            turn[0] = 1
            files.save_checked({"n": 2}, path)
        return data

    monkeypatch.setattr(Path, "read_bytes", read_then_replaced)
    assert files.load_checked(path) == {"n": 2}


def test_file_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        files.atomic_write_text(tmp_path / "a", "")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


def test_load_checked_raises_on_garbage_or_missing_digest(path: Path) -> None:
    digest = path.with_name("a.pt.sha256")
    digest.write_bytes(b"\xff\xfe")
    with pytest.raises(files.CorruptFileError, match="is damaged"):
        files.load_checked(path)
    digest.unlink()
    with pytest.raises(files.CorruptFileError, match=r"no digest file \(a\.pt\.sha256\)"):
        files.load_checked(path)


def test_load_checked_runs_no_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, (f"touch {tmp_path}/ran",)

    files.save_checked({"w": Evil()}, tmp_path / "a.pt")
    with pytest.raises(files.CorruptFileError, match=r"a\.pt is refused: .* could run code\. Nothing in it was run"):
        files.load_checked(tmp_path / "a.pt")
    assert not (tmp_path / "ran").exists()


def test_garbage_with_valid_digest_raises_corrupt_file_error(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    files.save_checked({"a": torch.arange(5), "b": [1.0, "x", None]}, path)
    whole, draw = path.read_bytes(), random.Random(0)
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(draw.randrange(1, 4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(data)
        (tmp_path / "a.pt.sha256").write_text(hashlib.sha256(data).hexdigest())
        with contextlib.suppress(files.CorruptFileError):
            files.load_checked(path)


def test_failed_write_leaves_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.json"
    files.atomic_write_text(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.atomic_write_text(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.json"]
