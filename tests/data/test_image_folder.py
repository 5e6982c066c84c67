"""Folders of images: classes, splits, and folders that are not laid out as they must be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torchvision

from metalearn.core.errors import DataError
from metalearn.data import image_decoding
from metalearn.data.image_decoding import load_image_splits
from metalearn.data.image_folder import EXTENSIONS, list_classes, list_splits
from tests.data.factories import make_classes, save_image

pytestmark = pytest.mark.usefixtures("image_cache")


def test_extensions_equal_torchvisions() -> None:
    assert set(EXTENSIONS) == set(torchvision.datasets.folder.IMG_EXTENSIONS)


def test_split_by_fractions_depends_on_seed_and_names_only(tmp_path: Path) -> None:
    make_classes(tmp_path / "a", {f"c{i:02}": 1 for i in range(20)})
    make_classes(tmp_path / "b", {f"c{i:02}": 2 for i in range(20)})

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
    with pytest.raises(ValueError, match=r"fractions=\[0\.5, 0\.25\]: give three fractions that add up to 1"):
        names("a", fractions=[0.5, 0.25])


@pytest.mark.parametrize("validation", ["val", "valid", "validation"])
def test_split_folders_are_used(validation: str, tmp_path: Path, caplog: Any) -> None:
    for folder, classes in (("train", ["b", "a"]), (validation, ["c"]), ("test", ["d", "a"])):
        make_classes(tmp_path / "root" / folder, dict.fromkeys(classes, 2))
    found = list_splits(tmp_path / "root")
    assert {s: [one.name for one in classes] for s, classes in found.items()} == {
        "train": ["a", "b"],
        "validation": ["c"],
        "test": ["a", "d"],
    }
    load_image_splits(tmp_path / "root", size=8)
    assert "1 class is in more than one split, so that tests are not of new classes: a." in caplog.text


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["train/a", "test/b"], "but it has none for validation"),
        (["train/a"], "but it has none for validation"),
        (["train/a", "val/b", "valid/c", "test/d"], r"more than one folder for validation \(val, valid\)"),
        (["train/a", "val/b", "test/c", "extra/d"], "also holds others: extra"),
    ],
)
def test_incomplete_split_folders_raise(folders: list[str], message: str, tmp_path: Path) -> None:
    for folder in folders:
        save_image(tmp_path / folder / "a.png")
    with pytest.raises(DataError, match=message):
        list_splits(tmp_path)


def test_class_may_be_called_train(tmp_path: Path) -> None:
    make_classes(tmp_path, {"train": 1, "bus": 1, "car": 1, "ship": 1, "plane": 1})
    assert sum(len(classes) for classes in list_splits(tmp_path).values()) == 5


def test_list_classes_recurses_and_ignores_hidden_files(tmp_path: Path) -> None:
    save_image(tmp_path / "a" / "2.png")
    save_image(tmp_path / "a" / "more" / "1.png")
    for other in (".hidden/x.png", "a/._2.png", ".DS_Store.png", "__MACOSX/a/x.png"):
        save_image(tmp_path / other)
    for other in ("README.txt", "a/Thumbs.db"):
        (tmp_path / other).write_text("no image")
    (found,) = list_classes(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in found.files] == ["a/2.png", "a/more/1.png"]


def test_cyclic_links_are_followed_once(tmp_path: Path) -> None:
    make_classes(tmp_path, {"a": 2, "b": 1})
    (tmp_path / "a" / "loop").symlink_to(tmp_path / "a")
    (tmp_path / "b" / "up").symlink_to(tmp_path)
    (tmp_path / "b" / "self").symlink_to(tmp_path / "b" / "self")
    classes = list_classes(tmp_path)
    assert [len(one.files) for one in classes] == [2, 1]
    assert classes[1].label == "b (1 link to nowhere (self) passed over)"


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda root: None, "there is no such folder"),
        (lambda root: root.mkdir(), "holds no images. It must hold one folder a class"),
        (lambda root: (root / "a").mkdir(parents=True), "holds no images"),
        (lambda root: save_image(root / "x.png"), "holds 1 image but no folders of classes"),
        (
            lambda root: (save_image(root / "x.png"), save_image(root / "a" / "x.png")),
            r"images \(x\.png\), which belong to no class",
        ),
    ],
)
def test_folder_without_classes_raises(prepare: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    prepare(tmp_path / "root")
    with pytest.raises(DataError, match=message):
        load_image_splits(tmp_path / "root", size=8)


def test_too_few_classes_or_images_raise_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_decoding, "_decode", None)  # nothing may be decoded
    root = make_classes(tmp_path / "root", {f"c{i}": 4 for i in range(9)} | {"c9": 3})
    where = next(split for split, classes in list_splits(root).items() if "c9" in [one.name for one in classes])
    needed = dict.fromkeys(("train", "validation", "test"), 4)
    with pytest.raises(DataError, match=rf"4 images of each class for {where}, .*, and 1 class has fewer: c9: 3\."):
        load_image_splits(root, size=8, needed=needed)
    with pytest.raises(DataError, match=r"validation has 2 classes \(c\d, c\d\), and a task takes task\.ways=3"):
        load_image_splits(root, size=8, ways=3)
    monkeypatch.undo()
    load_image_splits(root, size=8, ways=2)


def test_class_too_small_after_skipping_raises(tmp_path: Path) -> None:
    root = make_classes(tmp_path / "root", {f"c{i}": 2 for i in range(5)})
    (root / "c0" / "000.png").write_text("no image")
    needed = dict.fromkeys(("train", "validation", "test"), 2)
    with pytest.raises(DataError, match=r"takes 2 images .* 1 class has fewer: c0: 1"):
        load_image_splits(root, size=8, needed=needed, on_unreadable="skip")
