"""data=torchvision and data.class_split: parts joined, splits by name, and data sets that cannot be used."""

from __future__ import annotations

import dataclasses
import inspect
import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import datasets

from metalearn.config.compose import compose, to_dataclass
from metalearn.config.options import TorchvisionConfig
from metalearn.config.run_config import changed_keys, relocate_data, resolve_data, without_paths
from metalearn.config.schema import TrainConfig, result_keys
from metalearn.config.validation import validate_train_config
from metalearn.core.errors import ConfigError, DataError
from metalearn.data.class_split import PUBLISHED, SPLITS, read_class_split, split_classes
from metalearn.data.splits import ImageSplits
from metalearn.data.torchvision_parts import open_parts
from metalearn.data.torchvision_sets import load_torchvision_splits
from metalearn.inference.loading import load
from metalearn.training.evaluate_run import evaluate_run
from metalearn.training.experiment import build_samplers
from metalearn.training.trainer import train
from tests.data.factories import CIFAR_100, make_classes

pytestmark = pytest.mark.usefixtures("image_cache")

FAKE = {"size": 60, "image_size": [3, 10, 10], "num_classes": 6}
THREE_PER_CLASS = dict.fromkeys(SPLITS, 3)


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder in the format of CIFAR-100, with two training images and one test image a class."""
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda path, md5: Path(path).is_file())
    return make_cifar(tmp_path / "root")


def make_cifar(root: Path, *, shift: int = 0) -> Path:
    """Save images whose red is the label, whose green is the number in the class, and whose blue is ``shift``."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True, exist_ok=True)
    for part, numbers in (("train", (0, 1)), ("test", (2,))):
        labels = [label for _ in numbers for label in reversed(range(100))]
        pixels = np.zeros((len(labels), 3, 32, 32), dtype=np.uint8)
        pixels[:, 0] = np.array(labels)[:, None, None]
        pixels[:, 1] = np.repeat(numbers, 100)[:, None, None]
        pixels[:, 2] = shift
        content = {"data": pixels.reshape(len(labels), -1), "fine_labels": labels}
        (folder / part).write_bytes(pickle.dumps(content))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": CIFAR_100}))
    return root


def fake(**settings: Any) -> ImageSplits:
    return load_torchvision_splits("FakeData", **{"options": FAKE, "size": 8, **settings})


def tensors(splits: ImageSplits) -> list[Tensor]:
    return [splits.train, splits.validation, splits.test]


def configured(*overrides: str) -> TrainConfig:
    small = ["data=torchvision", "task.ways=2", "task.queries=1", "data.size=28", *overrides]
    config = to_dataclass(compose("train", small), TrainConfig)
    validate_train_config(config)
    return config


def define(monkeypatch: pytest.MonkeyPatch, *examples: Any, **attributes: Any) -> None:
    """Add a data set ``Mine`` of these examples to torchvision."""

    def init(self: Any) -> None:
        self.__dict__.update(attributes)

    methods = {"__init__": init, "__len__": lambda self: len(examples), "__getitem__": lambda self, i: examples[i]}
    monkeypatch.setattr(datasets, "Mine", type("Mine", (datasets.VisionDataset,), methods), raising=False)


def test_parts_are_joined_with_their_pixels(cifar: Path) -> None:
    splits = load_torchvision_splits("CIFAR100", cifar, size=32, class_split="cifar_fs", needed=THREE_PER_CLASS)
    assert splits.counts is not None
    for split, images, counts in zip(SPLITS, tensors(splits), splits.counts, strict=True):
        names = read_class_split("cifar_fs")[split]
        assert list(counts) == [3] * len(names)
        by_class = images.view(len(names), 3, 3, 32, 32)
        labels = torch.tensor([CIFAR_100.index(name) for name in names])
        assert torch.equal(by_class[:, :, 0], labels[:, None, None, None].expand(-1, 3, 32, 32).to(torch.uint8))
        assert torch.equal(by_class[0, :, 1, 0, 0], torch.tensor([0, 1, 2], dtype=torch.uint8))


def test_one_part_can_be_chosen(cifar: Path) -> None:
    splits = load_torchvision_splits("CIFAR100", cifar, options={"train": False}, size=8, channels=1)
    assert splits.train.shape == (60, 1, 8, 8)


def test_split_by_fractions_depends_on_names_and_seed_only(cifar: Path) -> None:
    first = split_classes(CIFAR_100, "", fractions=(0.6, 0.2, 0.2), seed=0)
    assert first == split_classes(CIFAR_100[::-1], "", fractions=(0.6, 0.2, 0.2), seed=0)
    assert first != split_classes(CIFAR_100, "", fractions=(0.6, 0.2, 0.2), seed=1)
    for seed in (0, 1):
        loaded = load_torchvision_splits("CIFAR100", cifar, size=8, seed=seed)
        chosen = split_classes(CIFAR_100, "", fractions=(0.6, 0.2, 0.2), seed=seed)
        for names, images in zip(chosen.values(), tensors(loaded), strict=True):
            assert [CIFAR_100[int(red)] for red in images[::3, 0, 0, 0]] == names
    small = load_torchvision_splits("CIFAR100", cifar, size=8, options={"train": True})
    assert torch.equal(small.test[::2, 0], load_torchvision_splits("CIFAR100", cifar, size=8).test[::3, 0])


def test_images_are_the_same_at_every_call() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, again = fake(), fake()
    assert torch.equal(state, torch.get_rng_state()), "the global generator is not moved"
    assert first.counts == again.counts
    assert all(torch.equal(a, b) for a, b in zip(tensors(first), tensors(again), strict=True))


@pytest.mark.parametrize("changed", [{"options": {**FAKE, "random_offset": 9}}, {"size": 9}, {"channels": 1}])
def test_settings_change_the_images(changed: dict[str, Any]) -> None:
    first, second = fake(), fake(**changed)
    assert first.train.shape != second.train.shape or not torch.equal(first.train, second.train)


def test_no_part_is_opened_twice() -> None:
    class Opened:
        def __init__(self, root: str, what: str | None = None, train: bool = True) -> None:
            opened.append((what, train))

        def __len__(self) -> int:
            return 1

    opened: list[tuple[str | None, bool]] = []
    assert [*open_parts(Opened, Path("x"), {"what": "nist"})] == ["data"]
    assert [*open_parts(Opened, Path("x"), {})] == ["train", "test"]
    assert opened == [("nist", True), (None, True), (None, False)]


def test_parts_are_those_that_a_data_set_has(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(*known: str) -> list[int]:
        def init(self: Any, split: str = "train") -> None:
            self.number = known.index(datasets.utils.verify_str_arg(split, "split", known))

        def item(self: Any, index: int) -> tuple[Image.Image, int]:
            return Image.new("L", (2, 2), self.number), index

        methods = {"__init__": init, "__len__": lambda self: 5, "__getitem__": item}
        monkeypatch.setattr(datasets, "Mine", type("Mine", (datasets.VisionDataset,), methods), raising=False)
        splits = load_torchvision_splits("Mine", size=2, channels=1)
        return splits.train[:, 0, 0, 0].unique().tolist()

    assert choose("train", "test") == [0, 1]
    assert choose("test", "val", "train", "trainval") == [0, 1, 2], "trainval is train and val"
    assert choose("trainval", "test") == [0, 1]
    with pytest.raises(DataError, match=r"Mine: it has no part called train; name one.*data\.options\.split=NAME"):
        choose("train-standard", "val")


@pytest.mark.parametrize(
    ("label", "kinds"),
    [(0.5, "float"), (None, "NoneType"), (Image.new("L", (2, 2)), "Image"), (-1, "int"), (True, "bool"), ({}, "dict")],
)
def test_examples_without_a_class_raise(label: Any, kinds: str, monkeypatch: pytest.MonkeyPatch) -> None:
    define(monkeypatch, (Image.new("L", (2, 2)), label))
    with pytest.raises(
        DataError, match=rf"example 0 of data is \(Image, {kinds}\), and must be an image and the number"
    ):
        load_torchvision_splits("Mine", size=2)


@pytest.mark.parametrize("label", [3, np.int64(3), torch.tensor(3)])
def test_whole_numbers_of_any_type_are_labels(label: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    define(monkeypatch, *[(Image.new("L", (2, 2)), other) for other in (0, 1, 2, label, 4)], classes=[*"abcde"])
    splits = load_torchvision_splits("Mine", size=2)
    assert [len(images) for images in tensors(splits)] == [3, 1, 1]


def test_unreadable_image_raises(tmp_path: Path) -> None:
    make_classes(tmp_path / "eurosat" / "2750", dict.fromkeys("abcde", 1))
    assert len(load_torchvision_splits("EuroSAT", tmp_path, size=8).train) == 3
    (tmp_path / "eurosat" / "2750" / "c" / "000.png").write_text("no image")
    with pytest.raises(DataError, match=r"EuroSAT: example 2 of data cannot be read \(cannot identify"):
        load_torchvision_splits("EuroSAT", tmp_path, size=8)


def test_empty_file_is_no_fault_of_the_options(tmp_path: Path) -> None:
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (folder / f"{name}-ubyte").touch()
    with pytest.raises(
        DataError, match=r"cannot open it .*Fetch what is missing or damaged by torchvision\.datasets\.M"
    ):
        load_torchvision_splits("MNIST", tmp_path)


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ("cifar-100", {}, r"data\.dataset=cifar-100: .* no such data set\. Did you mean CIFAR100\?"),
        ("zzzzzz", {}, r"no such data set\. It has CIFAR10, CIFAR100, "),
        ("VisionDataset", {}, "no such data set"),
        ("Omniglot", {}, "take data=omniglot"),
        ("CocoDetection", {}, r"it needs more arguments; give data\.options\.annFile=VALUE"),
        ("EMNIST", {}, r"give data\.options\.split=VALUE"),
        ("CIFAR100", {"trian": True}, r"data\.options\.trian: CIFAR100 has no such argument; it has train"),
        ("CIFAR100", {"root": "x"}, r"data\.options\.root: give data\.root instead"),
        ("CIFAR100", {"download": True}, r"data\.options\.download: fetch the data set first"),
        ("Flowers102", {"split": "x"}, r"data\.options\.split=x: Unknown value .*'train', 'val', 'test'"),
        ("CIFAR100", {}, r"looks in data\.root=.*; missing: .*/train, .*/test\. Fetch .*CIFAR100\(.*download=True\)"),
        ("KMNIST", {}, r"It looks in data\.root=.* \(.*KMNIST/raw/train-images-idx3-ubyte"),
        ("SEMEION", {}, r"It looks in data\.root="),  # which downloads unless it is told not to
        ("StanfordCars", {"split": "test"}, r"cannot open it \(Dataset not found"),
        ("Imagenette", {"size": "x"}, r"cannot take these data\.options \(Unknown value 'x' for argument size"),
        ("FakeData", {"image_size": 3}, r"example 0 of data cannot be read \(.* iterable, not int\)\. .*data\.options"),
        ("FakeData", {"size": "many"}, r"FakeData: torchvision cannot take these data\.options"),
        ("FakeData", {"size": -5}, r"FakeData: torchvision cannot take these data\.options"),
        ("ImageFolder", {}, "take data=images"),
        ("LSUN", {}, "it unpickles a file"),
        ("Caltech256", {"loader": "x"}, r"data\.options\.loader: Caltech256 has no such argument"),
    ],
)  # fmt: skip
def test_data_set_that_cannot_be_opened_raises(
    dataset: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        load_torchvision_splits(dataset, tmp_path, options=options)


def test_damaged_file_is_told_from_a_missing_one(cifar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(DataError, match="where all are, but not as published"):
        load_torchvision_splits("CIFAR100", cifar)


def test_segmentation_raises(tmp_path: Path) -> None:
    folder = tmp_path / "VOCdevkit" / "VOC2012"
    for place, name in (("JPEGImages", "a.jpg"), ("SegmentationClass", "a.png")):
        (folder / place).mkdir(parents=True)
        Image.new("L", (4, 4)).save(folder / place / name)
    (folder / "ImageSets" / "Segmentation").mkdir(parents=True)
    (folder / "ImageSets" / "Segmentation" / "train.txt").write_text("a\n")
    with pytest.raises(DataError, match=r"VOCSegmentation: example 0 of data is \(Image, PngImageFile\)"):
        load_torchvision_splits("VOCSegmentation", tmp_path)


def test_set_larger_than_the_memory_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2 * 60 * 3 * 8 * 8 - 1))
    with pytest.raises(DataError, match=r"its 60 images of 8 x 8 pixels take 1.07e-05 GiB, .* Lower data\.size"):
        fake()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2 * 60 * 3 * 8 * 8))
    fake()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ways": 2}, r"data\.dataset=FakeData: validation has 1 class \(\d\), and a task takes task\.ways=2"),
        ({"needed": dict.fromkeys(SPLITS, 50)}, r"FakeData: a task takes 50 images of each class for train, .* fewer"),
        ({"size": 0}, "size=0; it must be at least 1"),
        ({"channels": 2}, "channels=2; it must be 1"),
    ],
)
def test_set_that_does_not_fit_the_task_raises(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((DataError, ValueError), match=message):
        fake(**settings)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.dataset=CIFAR", r"data\.dataset=CIFAR: .*Did you mean CIFAR10"),
        ("data.dataset=PhotoTour", r"give data\.options\.name=VALUE"),
        ("data.dataset=CIFAR100 data.class_split=cifar", r"data\.class_split=cifar: there is no such file"),
        ("data.dataset=CIFAR100 data.fractions=[0.5,0.5]", "must be 3 numbers above 0"),
        (
            "data.dataset=CIFAR100 task.ways=17 data.class_split=cifar_fs",
            r"data\.class_split: validation has 16 classes",
        ),
        ("data.dataset=CIFAR100 model=resnet12 data.size=15", r"data\.size=15: model=resnet12 halves images 4 times"),
        ("data.size=28", r"data\.dataset is required"),
    ],
)
def test_config_that_is_wrong_raises_before_reading(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configured(*override.split())


def test_paths_are_resolved_relocated_and_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    split = {"train": ["a", "d"], "validation": ["b", "e"], "test": ["c", "f"]}
    (tmp_path / "split.json").write_text(json.dumps(split))
    config = configured("data.dataset=CIFAR100", "data.root=data", "data.class_split=split.json")
    before = resolve_data(config)
    data = before.data
    assert isinstance(data, TorchvisionConfig)
    assert (data.root, data.class_split) == (str(tmp_path / "data"), split)
    (tmp_path / "split.json").write_text(json.dumps({**split, "train": ["c", "f"], "test": ["a", "d"]}))
    assert "data.class_split.test" in changed_keys(result_keys(resolve_data(config)), result_keys(before))
    assert relocate_data(data, None) == data
    assert relocate_data(data, "/elsewhere") == dataclasses.replace(data, root="/elsewhere")
    assert without_paths(before).data == dataclasses.replace(data, root="data")
    for published in PUBLISHED:
        resolved = resolve_data(configured("data.dataset=CIFAR100", f"data.class_split={published}")).data
        assert isinstance(resolved, TorchvisionConfig)
        assert (resolved.root, resolved.class_split, resolved.label) == (None, published, "CIFAR100")
    assert "data.root" not in result_keys(config)


def test_yaml_and_signature_have_equal_defaults() -> None:
    data = dataclasses.asdict(configured("data.dataset=CIFAR100", "data.size=84").data)
    signature = {name: p.default for name, p in inspect.signature(load_torchvision_splits).parameters.items()}
    for name in ("root", "size", "channels", "seed", "class_split"):
        assert data[name] == signature[name]
    assert (tuple(data["fractions"]), data["options"]) == (signature["fractions"], {})


def test_run_is_trained_evaluated_and_adapted(tmp_path: Path) -> None:
    small = [
        *("data.dataset=FakeData", "data.options={size: 90, image_size: [3, 28, 28], num_classes: 10}"),
        *("model.width=4", "outer.iterations=2", "eval.every=2", "eval.validation_episodes=2", "eval.episodes=2"),
        *("task.meta_batch=2", "run.device=cpu", "run.threads=1", "log.images=false"),
    ]
    config = resolve_data(configured(*small))
    assert torch.equal(*(build_samplers(config, torch.device("cpu"))[2].tasks(0, 2).query_x for _ in range(2)))
    run = tmp_path / "run"
    train(config, run)
    evaluate_run(config, run, tmp_path / "evaluation")
    tested = [json.loads((place / "metrics.json").read_text()) for place in (run, tmp_path / "evaluation")]
    assert tested[0]["test.accuracy_per_step"] == tested[1]["test.accuracy_per_step"]
    learner = load(run, "cpu")
    x = torch.randint(256, (4, 3, 28, 28), dtype=torch.uint8)
    assert learner.adapt(x, [0, 0, 1, 1]).predict(x)[0] in (0, 1)
