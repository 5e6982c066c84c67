"""data.class_split and data.fractions: published splits, a user's file, and those that do not fit."""

from __future__ import annotations

import hashlib
import json
import logging
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from metalearn.config.compose import compose, to_dataclass
from metalearn.config.schema import TrainConfig
from metalearn.config.validation import validate_train_config
from metalearn.core.errors import ConfigError, DataError
from metalearn.data.class_split import SPLITS, read_class_split, split_classes
from metalearn.data.image_decoding import load_image_splits
from metalearn.data.splits import ImageSplits
from metalearn.data.torchvision_sets import load_torchvision_splits
from tests.data.factories import CIFAR_100, make_classes

pytestmark = pytest.mark.usefixtures("image_cache")


def tensors(splits: ImageSplits) -> list[Tensor]:
    return [splits.train, splits.validation, splits.test]


def write(path: Path, content: Any) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def test_cifar_fs_has_all_classes_of_cifar_100_once() -> None:
    split = read_class_split("cifar_fs")
    assert [len(split[name]) for name in SPLITS] == [64, 16, 20]
    assert sorted(chain(*split.values())) == CIFAR_100
    # Of the first and last of each list that Bertinetto et al. publish.
    assert {"train", "skyscraper", "house", "cloud"} <= {*split["train"]}
    assert {"otter", "motorcycle", "sea", "cattle"} <= {*split["validation"]}
    assert {"baby", "bed", "woman", "worm"} <= {*split["test"]}


def test_mini_imagenet_has_a_hundred_classes_once() -> None:
    split = read_class_split("mini_imagenet")
    names = [*chain(*split.values())]
    assert [len(split[name]) for name in SPLITS] == [64, 16, 20]
    assert len({*names}) == 100
    assert all(name[0] == "n" and len(name) == 9 and name[1:].isdigit() for name in names)
    digest = hashlib.sha256(json.dumps(split, sort_keys=True).encode()).hexdigest()
    assert digest.startswith("f42ae2176acd")


def test_folder_of_the_same_names_is_split_alike(tmp_path: Path) -> None:
    folder = load_image_splits(make_classes(tmp_path / "root", dict.fromkeys("01234", 1)), size=8)
    chosen = split_classes([*"43210"], "", fractions=(0.6, 0.2, 0.2), seed=0)
    for names, images in zip(chosen.values(), tensors(folder), strict=True):
        assert [str(int(red) // 20) for red in images[:, 0, 0, 0]] == names


def test_file_of_a_class_split(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write(tmp_path / "split.json", {"train": ["e", "a"], "validation": ["c"], "test": ["b"]})
    root = make_classes(tmp_path / "eurosat" / "2750", dict.fromkeys("abcde", 1))
    with caplog.at_level(logging.INFO):
        splits = load_image_splits(root, size=8, class_split=file)
        again = load_torchvision_splits("EuroSAT", tmp_path, size=8, class_split=file)
    assert [[int(red) // 20 for red in images[:, 0, 0, 0]] for images in tensors(splits)] == [[0, 4], [2], [1]]
    assert [record.message for record in caplog.records] == 2 * [f"data.class_split={file} leaves out 1 class: d"]
    assert all(torch.equal(a, b) for a, b in zip(tensors(splits), tensors(again), strict=True))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train": ["a"], "validation": ["z"], "test": ["b", "y"]}, r"data\.root=.* lacks 2 of its 4 classes: y, z\."),
        ({"train": ["a"], "validation": ["b"], "test": ["a"]}, r"1 class is named twice: a \(train and test\)"),
        ({"train": ["a", "a"], "validation": ["b"], "test": ["c"]}, r"a \(train and train\)"),
        ({"train": ["a"], "val": ["b"], "test": ["c"]}, r"this must hold \{\"train\": \[NAME"),
        ({"train": ["a"], "validation": [], "test": ["c"]}, "with one name or more in each"),
        ({"train": ["a"], "validation": [3], "test": ["c"]}, "this must hold"),
        ([], "this must hold"),
    ],
)  # fmt: skip
def test_class_split_that_does_not_fit_raises(content: Any, message: str, tmp_path: Path) -> None:
    root = make_classes(tmp_path / "root", dict.fromkeys("abcde", 3))
    file = write(tmp_path / "split.json", content)
    with pytest.raises(DataError, match=message):
        load_image_splits(root, size=8, class_split=file)
    with pytest.raises(ConfigError, match=message):  # before anything is read
        validate_train_config(
            to_dataclass(
                compose("train", ["data=images", f"data.root={root}", f"data.class_split={file}"]), TrainConfig
            )
        )


def test_class_split_that_cannot_be_read_raises(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"=cifar-fs: there is no such file\. Did you mean cifar_fs\? .* mini_imagenet"):
        read_class_split("cifar-fs")
    for text in ("{", '{"train": ["a"], "train": ["b"], "validation": ["c"], "test": ["d"]}', 9999 * "["):
        (tmp_path / "split.json").write_text(text)
        with pytest.raises(DataError, match="this cannot be read"):
            read_class_split(str(tmp_path / "split.json"))
    for place in (tmp_path, tmp_path / "split.json"):
        with pytest.raises(DataError, match="this cannot be read"):
            read_class_split(str(place))
    for split in ("train", "val", "test"):
        make_classes(tmp_path / "root" / split, {"a": 1})
    with pytest.raises(DataError, match=r"data\.class_split: .* is split by folders already"):
        load_image_splits(tmp_path / "root", class_split="cifar_fs")
