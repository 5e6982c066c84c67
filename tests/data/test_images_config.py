"""data=images: from a configuration to tasks."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import pytest
import torch

from metalearn.config.compose import compose, to_dataclass
from metalearn.config.options import ImagesConfig
from metalearn.config.run_config import relocate_data, resolve_data
from metalearn.config.schema import TrainConfig
from metalearn.config.validation import validate_train_config
from metalearn.core.errors import ConfigError
from metalearn.data.image_decoding import load_image_splits
from metalearn.training.experiment import build_samplers
from tests.data.factories import make_classes


def configured(root: Path, *overrides: str) -> TrainConfig:
    settings = ["data=images", f"data.root={root}", "task.ways=2", "task.queries=2", "data.size=28", *overrides]
    config = to_dataclass(compose("train", settings), TrainConfig)
    validate_train_config(config)
    return config


def test_build_samplers_from_folder(tmp_path: Path) -> None:
    root = make_classes(tmp_path / "root", {f"c{i}": 3 + i % 2 for i in range(10)})
    train, validation, test = build_samplers(configured(root), torch.device("cpu"))
    assert train.tasks(0, 3).query_x.shape == (3, 2 * 2, 3, 28, 28)
    assert validation.tasks(0, 3).query_x.shape == test.tasks(0, 3).query_x.shape == (3, 2, 3, 28, 28)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.ways=3", r"validation has 2 classes .*task\.ways=3(?s:.*)test has 2 classes"),
        ("task.queries=3", r"takes 4 images of each class for train, .* fewer"),
        ("eval.queries=4", r"takes 5 images of each class for test, .* fewer.*eval\.queries"),
        ("data.fractions=[0.5,0.5]", r"data\.fractions=\[0\.5, 0\.5\]: must be 3 numbers above 0"),
        ("data.fractions=[0.5,0.4,0.2]", "must be three shares that add up to 1"),
        ("data.fractions=[1.5,0.4,0.2]", r"data\.fractions=\[1\.5, 0\.4, 0\.2\]: must be 3 numbers"),
        ("data.channels=2", r"data\.channels=2: must be one of 1, 3 \(1: grey; 3"),
        ("data.on_unreadable=maybe", r"data\.on_unreadable=maybe: must be one of stop, skip"),
        ("data.root=/nowhere", "/nowhere: there is no such folder"),
        ("model=resnet12 data.size=15", r"data\.size=15: model=resnet12 halves images 4 times and needs at least 16"),
        ("model.pool=max data.size=15", r"data\.size=15: model=conv4 halves images 4 times"),
    ],
)
def test_config_that_does_not_fit_the_folder_raises(override: str, message: str, tmp_path: Path) -> None:
    root = make_classes(tmp_path / "root", {f"c{i}": 3 for i in range(10)})
    with pytest.raises(ConfigError, match=message):
        configured(root, *override.split())


def test_data_root_is_required() -> None:
    with pytest.raises(ConfigError, match=r"data\.root is required"):
        to_dataclass(compose("train", ["data=images"]), TrainConfig)


def test_relative_root_is_made_absolute_and_can_be_relocated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_classes(tmp_path / "root", {f"c{i}": 3 for i in range(10)})
    monkeypatch.chdir(tmp_path)
    data = resolve_data(configured(Path("root"))).data
    assert isinstance(data, ImagesConfig)
    assert data.root == str(tmp_path / "root")
    assert relocate_data(data, None) == data
    assert relocate_data(data, "/elsewhere") == dataclasses.replace(data, root="/elsewhere")


def test_yaml_and_signature_have_equal_defaults(tmp_path: Path) -> None:
    data = dataclasses.asdict(configured(make_classes(tmp_path / "root", {f"c{i}": 3 for i in range(10)})).data)
    signature = {name: p.default for name, p in inspect.signature(load_image_splits).parameters.items()}
    for name in ("channels", "seed", "on_unreadable"):
        assert data[name] == signature[name]
    assert tuple(data["fractions"]) == signature["fractions"]
    assert compose("train", ["data=images"]).data.size == signature["size"]
