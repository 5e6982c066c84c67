"""A user's folder of images: any mode and size is read, every fault is named, and a change is noticed."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from metalearn.config.compose import compose, to_dataclass
from metalearn.config.run_config import relocate_data, resolve_data
from metalearn.config.schema import ImagesConfig, TrainConfig
from metalearn.config.validation import validate_train_config
from metalearn.core.errors import ConfigError, DataError
from metalearn.data import image_decoding as images_module
from metalearn.data.image_decoding import UnreadableImagesError, load_image_splits, read_folder
from metalearn.data.image_folder import EXTENSIONS, list_classes, list_splits
from metalearn.data.metadata import cache_dir
from metalearn.data.sampler import EpisodeSampler, TaskShape
from metalearn.data.splits import ImageSplits
from metalearn.training.tasks import build_samplers

ORANGE = (255, 128, 0)


@pytest.fixture(autouse=True)
def _cache_of_this_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METALEARN_CACHE", str(tmp_path / "cache"))


def save(path: Path, colour: tuple[int, ...] = ORANGE, size: tuple[int, int] = (30, 20)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def make(root: Path, counts: dict[str, int]) -> Path:
    """Classes of that many images; an image's red tells its class, in sorted order, and its green its number."""
    for label, (name, count) in enumerate(sorted(counts.items())):
        for number in range(count):
            save(root / name / f"{number:03}.png", (20 * label, 10 * number, 0))
    return root


def one(path: Path, *, channels: int = 3, size: int = 16) -> torch.Tensor:
    """The image of a folder that holds one."""
    return read_folder(path.parent, size=size, channels=channels, may_be_flat=True).images[0]


def splits(root: Path, **settings: Any) -> ImageSplits:
    return load_image_splits(root, **{"size": 8, **settings})


# What is read


def noise(mode: str) -> Image.Image:
    """An image in this mode that is orange, as near as the mode can come to it."""
    if mode == "I;16":
        return Image.fromarray(np.full((20, 30), 257 * 150, dtype=np.uint16))
    return Image.new("RGB", (30, 20), ORANGE).convert(mode)


GREY = 151  # of orange, by ITU-R 601: 0.299 * 255 + 0.587 * 128


@pytest.mark.parametrize(
    ("mode", "file", "colour"),
    [
        ("RGB", "a.png", ORANGE),
        ("RGB", "a.PNG", ORANGE),
        ("RGB", "a.jpg", ORANGE),
        ("RGB", "a.webp", ORANGE),
        ("RGB", "a.ppm", ORANGE),
        ("L", "a.png", (GREY, GREY, GREY)),
        ("L", "a.jpeg", (GREY, GREY, GREY)),
        ("P", "a.png", (255, 102, 0)),  # the nearest of the web's 216 colours
        ("RGBA", "a.png", ORANGE),
        ("RGBA", "a.tiff", ORANGE),
        ("LA", "a.png", (GREY, GREY, GREY)),
        ("1", "a.bmp", None),
        ("CMYK", "a.jpg", ORANGE),
        ("CMYK", "a.tif", ORANGE),
        ("YCbCr", "a.jpg", ORANGE),
        ("I;16", "a.png", (150, 150, 150)),
        ("I;16", "a.tif", (150, 150, 150)),
        ("I;16", "a.pgm", (150, 150, 150)),
    ],
)
def test_every_mode_becomes_colour_or_grey(
    mode: str, file: str, colour: tuple[int, ...] | None, tmp_path: Path
) -> None:
    saved = noise(mode)
    if mode == "P":
        saved = Image.new("P", (30, 20), 0)
        saved.putpalette([255, 102, 0] * 256)
    saved.save(tmp_path / file)
    got, grey = one(tmp_path / file), one(tmp_path / file, channels=1)
    assert (got.shape, grey.shape, got.dtype) == ((3, 16, 16), (1, 16, 16), torch.uint8)
    if colour is not None:
        middle = got[:, 8, 8].tolist()
        assert middle == pytest.approx(colour, abs=4), "JPEG keeps colours to within a few"
        luma = sum(weight * value for weight, value in zip((0.299, 0.587, 0.114), middle, strict=True))
        assert grey[0, 8, 8].item() == pytest.approx(luma, abs=2)


def test_sixteen_bits_keep_their_order(tmp_path: Path) -> None:
    steps = np.linspace(0, 65535, 16).astype(np.uint16)
    Image.fromarray(np.tile(steps, (16, 1))).save(tmp_path / "a.png")
    assert one(tmp_path / "a.png", channels=1)[0, 0].tolist() == [round(int(s) / 257) for s in steps]


@pytest.mark.parametrize("how", ["RGBA", "LA", "palette"])
def test_what_is_transparent_is_white(how: str, tmp_path: Path) -> None:
    if how == "palette":
        image = Image.new("P", (8, 8), 0)
        image.putpalette([10, 20, 30] * 256)
        image.save(tmp_path / "a.png", transparency=0)
    else:
        Image.new(how, (8, 8), (0, 0, 0, 0) if how == "RGBA" else (0, 0)).save(tmp_path / "a.png")
    assert (one(tmp_path / "a.png") == 255).all()


def test_an_image_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    pixels[:8] = 255  # the upper half is white; orientation 6 has the camera's top on the right
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    got = one(tmp_path / "a.png")[0]
    assert got[:, 12].float().mean() > 250
    assert got[:, 3].float().mean() < 5


def test_the_square_in_the_middle_is_taken_and_resized_with_antialiasing(tmp_path: Path) -> None:
    pixels = np.zeros((64, 128), dtype=np.uint8)
    pixels[:, 32:96:2] = 255  # stripes in the middle square, which antialiasing makes grey; black beside it
    Image.fromarray(pixels).save(tmp_path / "a.png")
    got = one(tmp_path / "a.png", channels=1, size=8)[0]
    assert got.min() > 100, "no black margin, and no stripe that was picked"
    assert got.max() < 155
    tall = tmp_path / "tall"
    tall.mkdir()
    Image.fromarray(np.rot90(pixels).copy()).save(tall / "a.png")
    assert one(tall / "a.png", channels=1, size=8).min() > 100


def test_a_large_jpeg_is_the_same_picture_as_a_png(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 255, 800).astype(np.uint8), (800, 1))
    for folder in ("j", "p"):
        (tmp_path / folder).mkdir()
    Image.fromarray(ramp).save(tmp_path / "j/a.jpg", quality=95)
    Image.fromarray(ramp).save(tmp_path / "p/a.png")
    difference = one(tmp_path / "j/a.jpg").int() - one(tmp_path / "p/a.png").int()
    assert difference.abs().max() <= 4


def test_extensions_are_torchvisions() -> None:
    assert set(EXTENSIONS) == set(torchvision.datasets.folder.IMG_EXTENSIONS)


# Splits


def test_classes_of_different_sizes_are_kept_apart_without_padding(tmp_path: Path) -> None:
    counts = {f"c{i}": 2 + i for i in range(5)}
    made = splits(make(tmp_path / "root", counts))
    assert made.counts is not None
    assert [len(made.train), len(made.validation), len(made.test)] == [sum(c) for c in made.counts]
    listed = list_splits(tmp_path / "root")
    for split in ("train", "validation", "test"):
        names = [one.name for one in listed[split]]
        images, sizes = getattr(made, split), getattr(made.counts, split)
        assert list(sizes) == [counts[name] for name in names]
        expected = [(20 * int(name[1]), 10 * n) for name in names for n in range(counts[name])]
        assert [(r, g) for r, g, _ in images[:, :, 4, 4].tolist()] == expected


def test_a_split_by_fractions_depends_on_seed_and_names_alone(tmp_path: Path) -> None:
    make(tmp_path / "a", {f"c{i:02}": 1 for i in range(20)})
    make(tmp_path / "b", {f"c{i:02}": 2 for i in range(20)})

    def names(root: str, **settings: Any) -> dict[str, list[str]]:
        return {
            split: [one.name for one in classes] for split, classes in list_splits(tmp_path / root, **settings).items()
        }

    first = names("a")
    assert {split: len(classes) for split, classes in first.items()} == {"train": 12, "validation": 4, "test": 4}
    assert len(set().union(*first.values())) == 20
    assert first == names("b")
    assert first != names("a", seed=1)
    assert len(names("a", fractions=[0.5, 0.25, 0.25])["train"]) == 10
    with pytest.raises(ValueError, match=r"fractions=\[0\.5, 0\.25\]: give three shares that add up to 1"):
        names("a", fractions=[0.5, 0.25])


@pytest.mark.parametrize("validation", ["val", "valid", "validation"])
def test_folders_of_splits_are_taken_as_they_are(validation: str, tmp_path: Path, caplog: Any) -> None:
    for folder, classes in (("train", ["b", "a"]), (validation, ["c"]), ("test", ["d", "a"])):
        make(tmp_path / "root" / folder, dict.fromkeys(classes, 2))
    found = list_splits(tmp_path / "root")
    assert {s: [one.name for one in classes] for s, classes in found.items()} == {
        "train": ["a", "b"],
        "validation": ["c"],
        "test": ["a", "d"],
    }
    splits(tmp_path / "root")
    assert "1 classes are in more than one split, so that tests are not of new classes: a." in caplog.text


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["train/a", "test/b"], "but it has none for validation"),
        (["train/a"], "but it has none for validation"),
        (["train/a", "val/b", "valid/c", "test/d"], r"more than one folder for validation \(val, valid\)"),
        (["train/a", "val/b", "test/c", "extra/d"], "holds others beside them: extra"),
    ],
)
def test_folders_of_splits_that_are_incomplete_are_named(folders: list[str], message: str, tmp_path: Path) -> None:
    for folder in folders:
        save(tmp_path / folder / "a.png")
    with pytest.raises(DataError, match=message):
        list_splits(tmp_path)


def test_trains_can_be_a_class(tmp_path: Path) -> None:
    make(tmp_path, {"train": 1, "bus": 1, "car": 1, "ship": 1, "plane": 1})
    assert sum(len(classes) for classes in list_splits(tmp_path).values()) == 5


def test_images_below_a_class_and_hidden_files_are_as_expected(tmp_path: Path) -> None:
    save(tmp_path / "a" / "2.png")
    save(tmp_path / "a" / "more" / "1.png")
    for other in (".hidden/x.png", "a/._2.png", ".DS_Store.png", "__MACOSX/a/x.png"):
        save(tmp_path / other)
    for other in ("README.txt", "a/Thumbs.db"):
        (tmp_path / other).write_text("no image")
    (found,) = list_classes(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in found.files] == ["a/2.png", "a/more/1.png"]


def test_links_that_go_round_in_circles_end(tmp_path: Path) -> None:
    make(tmp_path, {"a": 2, "b": 1})
    (tmp_path / "a" / "loop").symlink_to(tmp_path / "a")
    (tmp_path / "b" / "up").symlink_to(tmp_path)
    (tmp_path / "b" / "self").symlink_to(tmp_path / "b" / "self")
    with pytest.raises(DataError, match=r"cannot be looked into .*b/self"):
        list_splits(tmp_path)
    (tmp_path / "b" / "self").unlink()
    assert [len(one.files) for one in list_classes(tmp_path)] == [2, 1]


# What is refused


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda root: None, "there is no such folder"),
        (lambda root: root.mkdir(), "holds no images. It must hold one folder a class"),
        (lambda root: (root / "a").mkdir(parents=True), "holds no images"),
        (lambda root: save(root / "x.png"), "holds 1 images but no folders of classes"),
        (
            lambda root: (save(root / "x.png"), save(root / "a" / "x.png")),
            r"images \(x\.png\), which belong to no class",
        ),
    ],
)
def test_a_folder_without_classes_is_named(prepare: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    prepare(tmp_path / "root")
    with pytest.raises(DataError, match=message):
        splits(tmp_path / "root")


def broken(root: Path, kinds: list[str]) -> list[Path]:
    """Files in class ``c0`` that cannot be read."""
    paths = []
    for kind in kinds:
        path = root / "c0" / f"bad {kind}"
        if kind == "truncated.jpg":
            Image.effect_noise((64, 64), 50).save(path)
            path.write_bytes(path.read_bytes()[:-600])
        elif kind == "flipped.png":
            Image.effect_noise((64, 64), 50).save(path)
            data = bytearray(path.read_bytes())
            data[-13] ^= 1  # in the checksum of the pixels, which decode all the same
            path.write_bytes(data)
        elif kind == "text.jpg":
            path.write_text("no image")
        elif kind == "empty.png":
            path.touch()
        elif kind == "bomb.png":
            save(path, size=(300, 300))
        elif kind == "nowhere.png":
            path.symlink_to("nowhere")
        elif kind == "float.tiff":
            Image.new("F", (8, 8)).save(path)
        else:
            assert kind == "pipe.png"
            os.mkfifo(path)
        paths.append(path)
    return paths


KINDS = ["truncated.jpg", "flipped.png", "text.jpg", "empty.png", "bomb.png", "nowhere.png", "float.tiff", "pipe.png"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_cannot_be_read_is_named(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200 * 200)
    root = make(tmp_path / "root", {f"c{i}": 2 for i in range(5)})
    (path,) = broken(root, [kind])
    with pytest.raises(UnreadableImagesError, match=rf"1 of 11 images cannot be read:\n  .*bad {kind}: .+\nReplace"):
        splits(root)
    path.unlink()
    splits(root)


def test_many_files_that_cannot_be_read_are_counted_or_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200 * 200)
    root = make(tmp_path / "root", {f"c{i}": 2 for i in range(5)})
    clean = splits(root)
    broken(root, KINDS)
    with pytest.raises(UnreadableImagesError, match="8 of 18 images cannot be read") as stopped:
        splits(root)
    assert len(str(stopped.value).splitlines()) == 1 + 5 + 1 + 1
    assert "and 3 more" in str(stopped.value)
    for _ in ("read", "from the cache"):
        caplog.clear()
        skipped = splits(root, unreadable="skip")
        assert "8 of 18 images cannot be read and are passed over" in caplog.text
        assert "bad bomb.png" in caplog.text
        assert skipped.counts == clean.counts
        assert torch.equal(skipped.train, clean.train)
    with pytest.raises(UnreadableImagesError):
        splits(root)


def test_a_permission_that_is_mended_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make(tmp_path / "root", {f"c{i}": 2 for i in range(5)})
    decode = images_module._decode

    def closed(path: Path, form: Any) -> Any:
        if path.parent.name == "c0":
            raise PermissionError(13, "Permission denied", str(path))
        return decode(path, form)

    monkeypatch.setattr(images_module, "_decode", closed)
    with pytest.raises(UnreadableImagesError, match=r"2 of 10 images cannot be read:\n.*Permission denied"):
        splits(root)
    monkeypatch.undo()
    monkeypatch.setenv("METALEARN_CACHE", str(tmp_path / "cache"))
    splits(root)


def test_classes_and_images_that_are_too_few_are_named_before_any_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = decoded(monkeypatch)
    root = make(tmp_path / "root", {f"c{i}": 4 for i in range(9)} | {"c9": 3})
    where = next(split for split, classes in list_splits(root).items() if "c9" in [one.name for one in classes])
    needed = dict.fromkeys(("train", "validation", "test"), 4)
    with pytest.raises(DataError, match=rf"for {where}, 1 have fewer than 4 images, .*shots and queries: c9: 3\."):
        splits(root, needed=needed)
    with pytest.raises(DataError, match=r"validation has 2 classes \(c\d, c\d\), and a task takes task\.ways=3"):
        splits(root, ways=3)
    assert not seen
    splits(root, ways=2)


def test_a_class_that_is_too_small_once_files_are_passed_over_is_named(tmp_path: Path) -> None:
    root = make(tmp_path / "root", {f"c{i}": 2 for i in range(5)})
    (root / "c0" / "000.png").write_text("no image")
    needed = dict.fromkeys(("train", "validation", "test"), 2)
    with pytest.raises(DataError, match=r"1 have fewer than 2 images, .*: c0: 1"):
        splits(root, needed=needed, unreadable="skip")


@pytest.mark.parametrize("settings", [{"channels": 2}, {"size": 0}, {"unreadable": "maybe"}])
def test_settings_that_are_none_are_named(settings: dict[str, Any], tmp_path: Path) -> None:
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=rf"{name}={value!r}; it must be"):
        splits(tmp_path, **settings)


# The cache


def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Paths of images as they are decoded."""
    seen: list[Path] = []
    decode = images_module._decode

    def watched(path: Path, form: Any) -> Any:
        seen.append(path)
        return decode(path, form)

    monkeypatch.setattr(images_module, "_decode", watched)
    return seen


def test_images_are_read_once_and_again_when_the_folder_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, seen = make(tmp_path / "root", {f"c{i}": 2 for i in range(5)}), decoded(monkeypatch)
    first = splits(root)
    assert len(seen) == 10
    assert torch.equal(splits(root).train, first.train)
    splits(root, seed=7)
    assert len(seen) == 10, "neither a second look nor another split reads again"
    splits(root, channels=1)
    splits(root, size=9)
    assert len(seen) == 30, "another form does"
    stat = (root / "c1" / "000.png").stat()
    save(root / "c1" / "000.png", (1, 2, 3))
    os.utime(root / "c1" / "000.png", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    splits(root)
    assert len(seen) == 40, "a changed file"
    (root / "c1" / "000.png").rename(root / "c1" / "new.png")
    splits(root)
    assert len(seen) == 50, "a renamed one"
    assert len(list(cache_dir().glob("images-8px-3c-*.pt"))) == 1, "old files do not pile up"


def test_a_damaged_cache_is_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = make(tmp_path / "root", {f"c{i}": 2 for i in range(5)})
    first = splits(root)
    (file,) = cache_dir().glob("images-*.pt")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert torch.equal(splits(root).train, first.train)
    assert "is damaged: its SHA-256 differs" in caplog.text
    caplog.clear()
    splits(root)
    assert not caplog.records


def test_a_cache_that_cannot_be_written_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("METALEARN_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        splits(make(tmp_path / "root", {f"c{i}": 2 for i in range(5)}))
    assert "The images could not be cached" in caplog.text


# One folder of classes, or of images alone


def test_a_folder_of_classes_is_a_support_set(tmp_path: Path) -> None:
    root = make(tmp_path / "support", {"cat": 2, "ant": 1, "bee": 3})
    read = read_folder(root, size=8, channels=3)
    assert read.labels is not None
    assert (read.classes, read.labels.tolist()) == (["ant", "bee", "cat"], [0, 1, 1, 1, 2, 2])
    assert read.images[:, 0, 4, 4].tolist() == [0, 20, 20, 20, 40, 40]
    assert [path.relative_to(root).as_posix() for path in read.paths][:2] == ["ant/000.png", "bee/000.png"]
    (root / "bee" / "001.png").write_text("no image")
    with pytest.raises(UnreadableImagesError, match=r"001\.png"):
        read_folder(root, size=8, channels=3)
    skipped = read_folder(root, size=8, channels=3, unreadable="skip")
    assert skipped.labels is not None
    assert skipped.labels.tolist() == [0, 1, 1, 2, 2]
    (root / "ant" / "000.png").write_text("no image")
    with pytest.raises(DataError, match="no readable image in ant"):
        read_folder(root, size=8, channels=3, unreadable="skip")


def test_a_flat_folder_is_a_query_set_without_labels(tmp_path: Path) -> None:
    for name in ("b.png", "a.png"):
        save(tmp_path / name)
    read = read_folder(tmp_path, size=8, channels=1, may_be_flat=True)
    assert (read.labels, read.classes, [path.name for path in read.paths]) == (None, [], ["a.png", "b.png"])
    assert read.images.shape == (2, 1, 8, 8)
    with pytest.raises(DataError, match="2 images but no folders of classes"):
        read_folder(tmp_path, size=8, channels=1)
    with pytest.raises(DataError, match="there is no such folder"):
        read_folder(tmp_path / "gone", size=8, channels=1)


# Tasks of classes that differ in size


def test_equal_counts_give_the_tasks_of_equal_classes() -> None:
    images = torch.arange(12 * 8, dtype=torch.uint8).view(12, 8, 1, 1, 1)
    shape = TaskShape(5, 2, 3)
    even = EpisodeSampler(images, shape, 0, "train").tasks(0, 20)
    flat = EpisodeSampler(images.flatten(0, 1), shape, 0, "train", [8] * 12).tasks(0, 20)
    assert torch.equal(even.support_x, flat.support_x)
    assert torch.equal(even.query_x, flat.query_x)


def test_small_classes_are_drawn_from_evenly_and_never_beyond_their_end() -> None:
    counts = [3, 10, 4, 7]
    images = torch.cat([torch.stack([torch.full((n,), c), torch.arange(n)], dim=1) for c, n in enumerate(counts)])
    sampler = EpisodeSampler(images.to(torch.uint8).view(-1, 1, 1, 2), TaskShape(3, 1, 2), 0, "train", counts)
    episodes = sampler.tasks(0, 4000)
    x = torch.cat([episodes.support_x, episodes.query_x], dim=1).mul(255).round().long()[:, :, 0, 0]
    y = torch.cat([episodes.support_y, episodes.query_y], dim=1)
    for task_x, task_y in zip(x[:200], y[:200], strict=True):
        assert len({tuple(pixels) for pixels in task_x.tolist()}) == 9, "no image twice in a task"
        assert all(len(set(task_x[task_y == label, 0].tolist())) == 1 for label in range(3)), "one class a label"
    for label, n in enumerate(counts):
        seen = x[x[:, :, 0] == label][:, 1].bincount(minlength=n)
        expected = seen.sum() / n
        assert len(seen) == n
        assert ((seen - expected) ** 2 / expected).sum() < 35, f"every image as likely: {seen.tolist()}"
    assert x[:, 0, 0].bincount().tolist() == pytest.approx([1000] * 4, rel=0.12), (
        "every class as likely, whatever its size"
    )


def test_counts_that_do_not_fit_are_named() -> None:
    images = torch.zeros(10, 1, 2, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match="counts add up to 9, but there are 10 images in split 'test'"):
        EpisodeSampler(images, TaskShape(2, 1, 1), 0, "test", [4, 5])
    with pytest.raises(
        ValueError, match="1 shots and 2 queries a class, but split 'test' has only 2 images in class 1"
    ):
        EpisodeSampler(images, TaskShape(2, 1, 2), 0, "test", [8, 2])
    with pytest.raises(
        ValueError, match=r"uint8 \[total, channels, height, width\], got torch.uint8 \(1, 10, 1, 2, 2\)"
    ):
        EpisodeSampler(images[None], TaskShape(2, 1, 1), 0, "test", [10])


# From a configuration


def configured(root: Path, *overrides: str) -> TrainConfig:
    settings = ["data=images", f"data.root={root}", "task.ways=2", "task.queries=2", "data.size=28", *overrides]
    config = to_dataclass(compose("train", settings), TrainConfig)
    validate_train_config(config)
    return config


def test_a_configured_folder_becomes_tasks(tmp_path: Path) -> None:
    root = make(tmp_path / "root", {f"c{i}": 3 + i % 2 for i in range(10)})
    train, validation, test = build_samplers(configured(root), torch.device("cpu"))
    assert train.tasks(0, 3).query_x.shape == (3, 2 * 2, 3, 28, 28)
    assert validation.tasks(0, 3).query_x.shape == test.tasks(0, 3).query_x.shape == (3, 2, 3, 28, 28)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.ways=3", r"validation has 2 classes .*task\.ways=3(?s:.*)test has 2 classes"),
        ("task.queries=3", r"of the classes for train, \d have fewer than 4 images"),
        ("eval.queries=4", r"of the classes for test, \d have fewer than 5 images.*eval\.queries"),
        ("data.fractions=[0.5,0.5]", r"data\.fractions=\[0\.5, 0\.5\]: must be three shares that add up to 1"),
        ("data.fractions=[0.5,0.4,0.2]", "must be three shares that add up to 1"),
        ("data.fractions=[1.5,0.4,0.2]", r"data\.fractions=\[1\.5, 0\.4, 0\.2\]: must be one or more numbers"),
        ("data.channels=2", r"data\.channels=2: must be 1 \(grey\) or 3"),
        ("data.on_unreadable=maybe", r"data\.on_unreadable=maybe: must be one of stop, skip"),
        ("data.root=/nowhere", "/nowhere: there is no such folder"),
        ("model=resnet12 data.size=15", r"data\.size=15: model=resnet12 halves images 4 times and needs at least 16"),
        ("model.pool=max data.size=15", r"data\.size=15: model=conv4 halves images 4 times"),
    ],
)
def test_a_configuration_that_does_not_fit_the_folder_is_refused(override: str, message: str, tmp_path: Path) -> None:
    root = make(tmp_path / "root", {f"c{i}": 3 for i in range(10)})
    with pytest.raises(ConfigError, match=message):
        configured(root, *override.split())


def test_a_folder_must_be_named() -> None:
    with pytest.raises(ConfigError, match=r"data\.root is required"):
        to_dataclass(compose("train", ["data=images"]), TrainConfig)


def test_a_relative_folder_is_kept_as_a_whole_path_and_may_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "root", {f"c{i}": 3 for i in range(10)})
    monkeypatch.chdir(tmp_path)
    data = resolve_data(configured(Path("root"))).data
    assert isinstance(data, ImagesConfig)
    assert data.root == str(tmp_path / "root")
    assert relocate_data(data, None) == data
    assert relocate_data(data, "/elsewhere") == dataclasses.replace(data, root="/elsewhere")


def test_yaml_and_signature_agree_on_defaults(tmp_path: Path) -> None:
    data = dataclasses.asdict(configured(make(tmp_path / "root", {f"c{i}": 3 for i in range(10)})).data)
    signature = {name: p.default for name, p in inspect.signature(load_image_splits).parameters.items()}
    for name in ("channels", "seed"):
        assert data[name] == signature[name]
    assert data["on_unreadable"] == signature["unreadable"]
    assert tuple(data["fractions"]) == signature["fractions"]
    assert compose("train", ["data=images"]).data.size == signature["size"]
