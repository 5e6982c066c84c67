"""Images of any mode and size are decoded, unreadable ones raise, and the cache notices a change."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from metalearn.core.errors import DataError
from metalearn.data import image_decoding as images_module
from metalearn.data.image_decoding import UnreadableImagesError, load_image_splits, read_folder
from metalearn.data.image_folder import list_splits
from metalearn.data.metadata import cache_dir
from metalearn.data.splits import ImageSplits
from tests.data.factories import ORANGE, make_classes, save_image

pytestmark = pytest.mark.usefixtures("image_cache")


def decode_one(path: Path, *, channels: int = 3, size: int = 16) -> torch.Tensor:
    return read_folder(path.parent, size=size, channels=channels, may_be_flat=True).images[0]


def decode(pixels: Any, path: Path, *, channels: int = 1, size: int = 16, **options: Any) -> torch.Tensor:
    """Save pixels as an image, alone in its folder, and decode it."""
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return decode_one(path, channels=channels, size=size)


def splits(root: Path, **settings: Any) -> ImageSplits:
    return load_image_splits(root, **{"size": 8, **settings})


def orange_image(mode: str) -> Image.Image:
    """Return an image in this mode, as orange as the mode allows."""
    if mode == "I;16":
        return Image.fromarray(np.full((20, 30), 257 * 150, dtype=np.uint16))
    return Image.new("RGB", (30, 20), ORANGE).convert(mode)


GREY = 151  # of orange, by ITU-R 601: 0.299 * 255 + 0.587 * 128


MODES: list[tuple[str, tuple[int, ...] | None, str]] = [
    ("RGB", ORANGE, "png PNG jpg webp ppm"),
    ("L", (GREY,) * 3, "png jpeg"),
    ("P", (255, 102, 0), "png"),  # the nearest of the web's 216 colours
    ("RGBA", ORANGE, "png tiff"),
    ("LA", (GREY,) * 3, "png"),
    ("1", None, "bmp"),
    ("CMYK", ORANGE, "jpg tif"),
    ("YCbCr", ORANGE, "jpg"),
    ("I;16", (150,) * 3, "png tif pgm"),
]


@pytest.mark.parametrize(
    ("mode", "file", "colour"),
    [(mode, f"a.{ext}", colour) for mode, colour, extensions in MODES for ext in extensions.split()],
)
def test_decoding_every_mode(mode: str, file: str, colour: tuple[int, ...] | None, tmp_path: Path) -> None:
    saved = orange_image(mode)
    if mode == "P":
        saved = Image.new("P", (30, 20), 0)
        saved.putpalette([255, 102, 0] * 256)
    saved.save(tmp_path / file)
    got, grey = decode_one(tmp_path / file), decode_one(tmp_path / file, channels=1)
    assert (got.shape, grey.shape, got.dtype) == ((3, 16, 16), (1, 16, 16), torch.uint8)
    if colour is not None:
        middle = got[:, 8, 8].tolist()
        assert middle == pytest.approx(colour, abs=4), "JPEG keeps colours to within a few"
        luma = sum(weight * value for weight, value in zip((0.299, 0.587, 0.114), middle, strict=True))
        assert grey[0, 8, 8].item() == pytest.approx(luma, abs=2)


def test_decoding_sixteen_bits(tmp_path: Path) -> None:
    steps = np.linspace(0, 65535, 16).astype(np.uint16)
    assert decode(np.tile(steps, (16, 1)), tmp_path / "a.png")[0, 0].tolist() == [round(int(s) / 257) for s in steps]


@pytest.mark.parametrize(("mode", "colour"), [("RGBA", (0, 0, 0, 0)), ("LA", (0, 0)), ("P", 0)])
def test_transparent_pixels_become_white(mode: str, colour: Any, tmp_path: Path) -> None:
    image = Image.new(mode, (8, 8), colour)
    if mode == "P":
        image.putpalette([10, 20, 30] * 256)
    image.save(tmp_path / "a.png", **{"transparency": 0} if mode == "P" else {})  # type: ignore[arg-type]
    assert (decode_one(tmp_path / "a.png") == 255).all()


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    pixels[:8] = 255  # the upper half is white; orientation 6 has the camera's top on the right
    exif = Image.Exif()
    exif[0x0112] = 6
    got = decode(pixels, tmp_path / "a.png", exif=exif)[0]
    assert got[:, 12].float().mean() > 250
    assert got[:, 3].float().mean() < 5


def test_central_square_is_resized_with_antialiasing(tmp_path: Path) -> None:
    pixels = np.zeros((64, 128), dtype=np.uint8)
    pixels[:, 32:96:2] = 255  # stripes in the middle square, which antialiasing makes grey; black beside it
    got = decode(pixels, tmp_path / "a.png", size=8)[0]
    assert got.min() > 100, "no black margin, and no stripe that was picked"
    assert got.max() < 155
    assert decode(np.rot90(pixels).copy(), tmp_path / "tall" / "a.png", size=8).min() > 100


def test_large_jpeg_equals_png(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 255, 800).astype(np.uint8), (800, 1))
    jpeg, png = decode(ramp, tmp_path / "j" / "a.jpg", quality=95), decode(ramp, tmp_path / "p" / "a.png")
    assert (jpeg.int() - png.int()).abs().max() <= 4


def test_classes_of_different_sizes_are_not_padded(tmp_path: Path) -> None:
    counts = {f"c{i}": 2 + i for i in range(5)}
    made = splits(make_classes(tmp_path / "root", counts))
    assert made.counts is not None
    assert [len(made.train), len(made.validation), len(made.test)] == [sum(c) for c in made.counts]
    listed = list_splits(tmp_path / "root")
    for split in ("train", "validation", "test"):
        names = [one.name for one in listed[split]]
        images, sizes = getattr(made, split), getattr(made.counts, split)
        assert list(sizes) == [counts[name] for name in names]
        expected = [(20 * int(name[1]), 10 * n) for name in names for n in range(counts[name])]
        assert [(r, g) for r, g, _ in images[:, :, 4, 4].tolist()] == expected


def noise(path: Path, edit: Callable[[bytearray], bytes | bytearray]) -> None:
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(edit(bytearray(path.read_bytes())))


BROKEN: dict[str, Callable[[Path], object]] = {
    "truncated.jpg": lambda path: noise(path, lambda data: data[:-600]),
    # in the checksum of the pixels, which decode all the same
    "flipped.png": lambda path: noise(path, lambda data: data[:-13] + bytes([data[-13] ^ 1]) + data[-12:]),
    "text.jpg": lambda path: path.write_text("no image"),
    "empty.png": Path.touch,
    "bomb.png": lambda path: save_image(path, size=(300, 300)),
    "nowhere.png": lambda path: path.symlink_to("nowhere"),
    "float.tiff": lambda path: Image.new("F", (8, 8)).save(path),
    "pipe.png": os.mkfifo,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of five classes of two images."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200 * 200)
    return make_classes(tmp_path / "root", {f"c{i}": 2 for i in range(5)})


@pytest.mark.parametrize("kind", BROKEN)
def test_unreadable_file_raises(kind: str, folder: Path) -> None:
    path = folder / "c0" / f"bad {kind}"
    BROKEN[kind](path)
    with pytest.raises(UnreadableImagesError, match=rf"1 of 11 images cannot be read:\n  .*bad {kind}: .+\nReplace"):
        splits(folder)
    path.unlink()
    splits(folder)


def test_unreadable_files_are_counted_or_skipped(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    clean = splits(folder)
    for kind, make in BROKEN.items():
        make(folder / "c0" / f"bad {kind}")
    with pytest.raises(UnreadableImagesError, match="8 of 18 images cannot be read") as stopped:
        splits(folder)
    assert len(str(stopped.value).splitlines()) == 1 + 5 + 1 + 1
    assert "and 3 more" in str(stopped.value)
    for _ in ("read", "from the cache"):
        caplog.clear()
        skipped = splits(folder, on_unreadable="skip")
        assert "8 of 18 images cannot be read and are skipped" in caplog.text
        assert "bad bomb.png" in caplog.text
        assert skipped.counts == clean.counts
        assert torch.equal(skipped.train, clean.train)
    with pytest.raises(UnreadableImagesError):
        splits(folder)


def test_fixed_permission_is_noticed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = images_module._decode

    def closed(path: Path, form: Any) -> Any:
        if path.parent.name == "c0":
            raise PermissionError(13, "Permission denied", str(path))
        return decode(path, form)

    monkeypatch.setattr(images_module, "_decode", closed)
    with pytest.raises(UnreadableImagesError, match=r"2 of 10 images cannot be read:\n.*Permission denied"):
        splits(folder)
    monkeypatch.undo()
    monkeypatch.setenv("METALEARN_CACHE", str(tmp_path / "cache"))
    splits(folder)


@pytest.mark.parametrize("settings", [{"channels": 2}, {"size": 0}, {"on_unreadable": "maybe"}])
def test_invalid_settings_raise(settings: dict[str, Any], tmp_path: Path) -> None:
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=rf"{name}={value!r}; it must be"):
        splits(tmp_path, **settings)


def record_decoded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    seen: list[Path] = []
    decode = images_module._decode

    def watched(path: Path, form: Any) -> Any:
        seen.append(path)
        return decode(path, form)

    monkeypatch.setattr(images_module, "_decode", watched)
    return seen


def test_cache_is_used_until_the_folder_changes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = record_decoded(monkeypatch)
    first = splits(folder)
    assert len(seen) == 10
    assert torch.equal(splits(folder).train, first.train)
    splits(folder, seed=7)
    assert len(seen) == 10, "neither a second look nor another split reads again"
    splits(folder, channels=1)
    splits(folder, size=9)
    assert len(seen) == 30, "another form does"
    stat = (folder / "c1" / "000.png").stat()
    save_image(folder / "c1" / "000.png", (1, 2, 3))
    os.utime(folder / "c1" / "000.png", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    splits(folder)
    assert len(seen) == 40, "a changed file"
    (folder / "c1" / "000.png").rename(folder / "c1" / "new.png")
    splits(folder)
    assert len(seen) == 50, "a renamed one"
    assert len(list(cache_dir().glob("images-8px-3c-*.pt"))) == 1, "old files do not pile up"


def test_corrupt_image_cache_is_rebuilt(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = splits(folder)
    (file,) = cache_dir().glob("images-*.pt")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert torch.equal(splits(folder).train, first.train)
    assert "is damaged: its SHA-256 differs" in caplog.text
    caplog.clear()
    splits(folder)
    assert not caplog.records


def test_unwritable_image_cache_only_warns(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("METALEARN_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        splits(folder)
    assert "The images could not be cached" in caplog.text


def test_read_folder_of_classes(tmp_path: Path) -> None:
    root = make_classes(tmp_path / "support", {"cat": 2, "ant": 1, "bee": 3})
    read = read_folder(root, size=8, channels=3)
    assert (read.classes, read.labels) == (["ant", "bee", "cat"], ["ant", *["bee"] * 3, *["cat"] * 2])
    assert read.images[:, 0, 4, 4].tolist() == [0, 20, 20, 20, 40, 40]
    assert [path.relative_to(root).as_posix() for path in read.paths][:2] == ["ant/000.png", "bee/000.png"]
    (root / "bee" / "001.png").write_text("no image")
    with pytest.raises(UnreadableImagesError, match=r"001\.png"):
        read_folder(root, size=8, channels=3)
    skipped = read_folder(root, size=8, channels=3, on_unreadable="skip")
    assert skipped.labels == ["ant", "bee", "bee", "cat", "cat"]
    (root / "ant" / "000.png").write_text("no image")
    with pytest.raises(DataError, match="no readable image in ant"):
        read_folder(root, size=8, channels=3, on_unreadable="skip")


def test_read_flat_folder_has_no_labels(tmp_path: Path) -> None:
    for name in ("b.png", "a.png"):
        save_image(tmp_path / name)
    read = read_folder(tmp_path, size=8, channels=1, may_be_flat=True)
    assert (read.labels, read.classes, [path.name for path in read.paths]) == (None, [], ["a.png", "b.png"])
    assert read.images.shape == (2, 1, 8, 8)
    with pytest.raises(DataError, match="2 images but no folders of classes"):
        read_folder(tmp_path, size=8, channels=1)
    with pytest.raises(DataError, match="there is no such folder"):
        read_folder(tmp_path / "gone", size=8, channels=1)


def test_file_of_a_killed_writer_is_removed_from_the_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []
    replace = os.replace

    def record(source: Path, target: Path) -> None:
        written.append(source)
        replace(source, target)

    monkeypatch.setattr(os, "replace", record)
    splits(folder)
    (*_, killed) = written
    at_work = killed.with_name(f"{killed.name[:-16]}{'0' * 16}")
    killed.touch()
    at_work.touch()
    os.utime(killed, (0, 0))
    splits(folder)
    assert at_work.exists(), "another process is writing it"
    assert not killed.exists()
