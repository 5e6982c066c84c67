"""Folders of images as disks, cameras and people leave them: helper folders, other formats, other names, link loops."""

from __future__ import annotations

import itertools
import threading
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

from metalearn.core.errors import DataError
from metalearn.data.image_decoding import UnreadableImagesError, load_image_splits, read_folder
from metalearn.data.image_folder import list_classes, list_splits
from metalearn.data.pillow_warnings import collect_pillow_warnings
from tests.data.factories import make_classes, save_image

HELPERS = ["lost+found", "@eaDir", "__MACOSX", ".Trash-1000", ".ipynb_checkpoints", "$RECYCLE.BIN", "$Recycle.Bin"]
HELPERS += ["System Volume Information", "#recycle", "#snapshot", "@Recycle", "@Recently-Snapshot", "@tmp", ".@__thumb"]
HELPERS += ["@__thumb", "Network Trash Folder", "Temporary Items", "RECYCLER", "~snapshot", ".AppleDouble", ".git"]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("METALEARN_CACHE", str(tmp_path / "cache"))
    return make_classes(tmp_path / "root", {f"c{i}": 2 for i in range(5)})


@pytest.mark.fault(
    "helper folders of file systems and NAS boxes, empty and with thumbnails, beside the classes and in them",
    "the same classes and images as without them",
    cases=2 * len(HELPERS),
)
def test_helper_folders(root: Path) -> None:
    before = list_splits(root)
    for name, holds_images in itertools.product(HELPERS, (False, True)):
        for place in (root / name, root / "c1" / name):
            place.mkdir(exist_ok=True)
            if holds_images:
                save_image(place / "a.jpg" / "thumbnail.jpg", size=(2, 2))
        (root / "c1" / "Thumbs.db").touch()
        assert list_splits(root) == before, name
        assert [one.name for one in list_classes(root)] == [f"c{i}" for i in range(5)]


FORMATS = [".gif", ".heic", ".jfif", ".HEIC", ".avif", ".svg", ".nef", ".jpg.part", ""]


@pytest.mark.fault(
    "images of other formats among a class's, in a class alone, and in a query folder",
    "a warning or an error that counts them by their endings",
    cases=len(FORMATS),
)
@pytest.mark.parametrize("ending", FORMATS)
def test_other_formats(ending: str, root: Path, caplog: pytest.LogCaptureFixture) -> None:
    kind = Path(f"x{ending}").suffix.lower() or "without an ending"
    (root / "c0" / f"a{ending}").write_bytes(b"image")
    (root / "c0" / f"b{ending}").write_bytes(b"image")
    assert load_image_splits(root, size=8).classes("train") == 3
    read_folder(root, size=8, channels=3)
    read_folder(root / "c0", size=8, channels=3, may_be_flat=True)
    assert [one.getMessage().count(f": 2 {kind} passed over. Images are .jpg, ") for one in caplog.records] == [1] * 3

    for path in (root / "c0").glob("*.png"):
        path.unlink()
    with pytest.raises(DataError, match=rf"1 class has fewer: c0 \(2 {kind} passed over\): 0"):
        load_image_splits(root, size=8)
    with pytest.raises(DataError, match=rf"holds no images \(2 {kind} passed over\)\."):
        read_folder(root / "c0", size=8, channels=3, may_be_flat=True)


SPLITS = [
    *(("Train", "Val", "Test"), ("training", "validation", "testing"), ("TRAIN", "VALID", "TEST")),
    *(("Training", "Validation", "Test"), ("train", "valid", "Testing")),
]


@pytest.mark.fault(
    "folders of splits in upper case, or called training, validation and testing; one of them missing",
    "taken for the splits, and never for classes",
    cases=4 * len(SPLITS),
)
def test_names_of_splits(tmp_path: Path) -> None:
    for number, names in enumerate(SPLITS):
        root = tmp_path / str(number)
        for name in names:
            make_classes(root / name, {f"{name}-a": 1, f"{name}-b": 1})
        listed = {split: [one.name for one in classes] for split, classes in list_splits(root).items()}
        assert list(listed) == ["train", "validation", "test"]
        assert list(listed.values()) == [[f"{name}-a", f"{name}-b"] for name in names]
        for name, split in zip(names, listed, strict=True):
            (root / name).rename(tmp_path / "aside")
            with pytest.raises(DataError, match=f"so it is split by folders, but it has none for {split}"):
                list_splits(root)
            (tmp_path / "aside").rename(root / name)


@pytest.mark.parametrize(
    "names", [("running", "training", "testing", "walking", "swim"), ("apple", "pear", "val", "test", "fig")]
)
def test_classes_that_are_called_like_splits(names: tuple[str, ...], tmp_path: Path) -> None:
    make_classes(tmp_path, dict.fromkeys(names, 1))
    found = [one.name for classes in list_splits(tmp_path).values() for one in classes]
    assert sorted(found) == sorted(names)


@pytest.mark.fault(
    "links that lead to themselves, to one another or nowhere: in a class, in place of an image, in place of a class",
    "named in a warning, or in the list of images that cannot be read",
    cases=4,
)
def test_link_loops(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = load_image_splits(root, size=8)
    for link, target in (("c0/self", "self"), ("c0/one", "two"), ("c0/two", "one"), ("c9", "c9"), ("gone", "nowhere")):
        (root / link).symlink_to(target)
    after = load_image_splits(root, size=8)
    assert all(torch.equal(getattr(after, split), getattr(before, split)) for split in ("train", "validation", "test"))
    assert f"{root}: 5 links to nowhere (one, self, two, c9, gone) passed over." in caplog.text
    (root / "c0" / "x.png").symlink_to("x.png")
    with pytest.raises(UnreadableImagesError, match=r"1 of 11 images .*\n.*c0/x\.png: it is no file, or a broken"):
        load_image_splits(root, size=8)


@pytest.mark.fault("an image that Pillow warns of", "one warning of ours that names the file, and none of Python's")
def test_pillow_warning(root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    save_image(root / "c0" / "large.png", size=(40, 40))
    save_image(root / "c0" / "larger.jpg", size=(41, 41))
    with warnings.catch_warnings(record=True) as printed:
        warnings.simplefilter("always")
        load_image_splits(root, size=8)
        assert not printed, str(printed[0].message)
        (line,) = caplog.messages
        assert line.startswith("Pillow warns of 2 images, and reads them all the same:\n")
        assert f"\n  {root}/c0/large.png: Image size (1600 pixels) exceeds limit" in line
        with collect_pillow_warnings():
            warnings.warn("of another kind", stacklevel=1)
        assert [str(one.message) for one in printed] == ["of another kind"]


def test_warnings_are_as_before_after_two_reads_at_once() -> None:
    shown, filters, inside = warnings.showwarning, list(warnings.filters), threading.Event()

    def read(wait: threading.Event) -> None:
        with collect_pillow_warnings():
            inside.set()
            wait.wait(0.2)

    threads = [threading.Thread(target=read, args=[threading.Event()]) for _ in range(2)]
    for thread in threads:
        thread.start()
        assert inside.wait(10)
    for thread in threads:
        thread.join(10)
    assert (warnings.showwarning, list(warnings.filters)) == (shown, filters)
