"""Images, numbers and labels of all types are converted, or rejected with a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import metalearn
from metalearn.core.errors import DataError, RunError
from metalearn.inference.inputs import example_shape
from metalearn.training.experiment import build_experiment
from tests.config.factories import train_config
from tests.inference.factories import query, scaled, support
from tests.training.run_folders import SINUSOID, SMALL


@pytest.mark.parametrize(
    "kind",
    [
        lambda x: x,
        lambda x: x.numpy(),
        lambda x: x.squeeze(1),
        lambda x: scaled(x),
        lambda x: scaled(x).double().numpy()[::-1].copy()[::-1],  # a view with negative strides
        lambda x: [Image.fromarray(one[0].numpy()) for one in x],
        lambda x: list(scaled(x)),
        lambda x: scaled(x).requires_grad_(),
    ],
    ids=["uint8", "numpy", "[S, H, W]", "float", "reversed float64", "Pillow", "list of tensors", "with gradients"],
)
def test_images_of_all_types_predict_the_same(kind: Any, run: Path) -> None:
    images, labels = support()
    got = metalearn.load(run, "cpu").adapt(kind(images), labels).predict_proba(kind(query()))
    assert torch.equal(got, metalearn.load(run, "cpu").adapt(images, labels).predict_proba(query()))
    assert not got.requires_grad


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([3, 3, 1, 1, 2, 2, 10, 10, 0, 0], [0, 1, 2, 3, 10]),
        (torch.tensor([3, 3, 1, 1, 2, 2, 4, 4, 0, 0]), [0, 1, 2, 3, 4]),
        (list(torch.tensor([3, 3, 1, 1, 2, 2, 4, 4, 0, 0])), [0, 1, 2, 3, 4]),
        (np.array(["é", "é", "a", "a", "b", "b", "c", "c", "d", "d"]), ["a", "b", "c", "d", "é"]),
        (list(np.arange(10) // 2), [0, 1, 2, 3, 4]),
        ([(i // 2, "x") for i in range(10)], [(i, "x") for i in range(5)]),
    ],
)
def test_labels_of_all_types_are_kept(labels: Any, classes: list[Any], run: Path) -> None:
    learner = metalearn.load(run, "cpu").adapt(support()[0], labels)
    assert learner.classes_ == classes
    assert [type(one) for one in learner.classes_] == [type(one) for one in classes]
    assert set(learner.predict(query())) <= set(classes)
    assert 0 <= learner.score(support()[0], labels) <= 1


IMAGES = torch.zeros(2, 1, 28, 28)
AB = ["a", "b"]
INVALID: list[tuple[Any, Any, str]] = [
    (IMAGES, "ab", r"labels='ab': give one label an image"),
    (torch.zeros(2, 1, 32, 28), AB, r"images are \[2, 1, 32, 28\], and the run was trained on .*\[any, 1, 28, 28\]"),
    (torch.zeros(2, 3, 28, 28), AB, r"images are \[2, 3, 28, 28\].*Resize or convert them"),
    (np.zeros((2, 28, 28, 1)), AB, r"Put the channels first: images\.transpose\(0, 3, 1, 2\)"),
    (torch.zeros(28, 28), AB, r"images are \[28, 28\]"),
    (IMAGES[:0], [], r"images are \[0, 1, 28, 28\]: there is none"),
    (IMAGES + 1.5, AB, r"images are from 1\.5 to 1\.5, and must be in \[0, 1\]: divide bytes by 255"),
    (IMAGES - 0.5, AB, r"images are from -0\.5 to -0\.5"),
    (IMAGES.long(), AB, r"images are torch\.int64; give uint8"),
    (torch.stack([IMAGES[0], IMAGES[0] * torch.nan]), AB, r"NaN or infinity, first at position 1"),
    ([np.zeros((28, 28)), np.zeros((27, 28))], AB, r"images cannot be converted to one tensor"),
    (None, AB, r"images cannot be converted to one tensor"),
    (IMAGES, [*AB, "c"], r"3 labels for 2 images"),
    (IMAGES, [["a"], ["b"]], r"label \['a'\] is a list; a label must be hashable"),
    (IMAGES, ["a", 1], r"labels of several types \(int, str\) cannot be sorted"),
    (IMAGES, ["a", "a"], r"every image has the label 'a'.*fewer than 2 classes"),
]


@pytest.mark.parametrize(("images", "labels", "message"), INVALID, ids=[message[:40] for *_, message in INVALID])
def test_adapt_raises_and_keeps_state_when_input_is_invalid(images: Any, labels: Any, message: str, run: Path) -> None:
    learner = metalearn.load(run, "cpu").adapt(*support())
    before = learner.predict_proba(query())
    with pytest.raises(DataError, match=message):
        learner.adapt(images, labels)
    assert torch.equal(learner.predict_proba(query()), before), "the adapted state is unchanged"


def test_predict_raises_when_queries_are_invalid(run: Path) -> None:
    learner = metalearn.load(run, "cpu").adapt(*support())
    with pytest.raises(DataError, match=r"images are \[1, 1, 27, 27\]"):
        learner.predict(torch.zeros(1, 1, 27, 27))
    with pytest.raises(DataError, match=r"labels 'z' are none of the 5 classes that were adapted to \('b', 'c'"):
        learner.score(query()[:2], ["b", "z"])


def test_regression_raises_when_input_is_invalid(sinusoid: Path) -> None:
    learner = metalearn.load(sinusoid, "cpu")
    cases: list[tuple[Any, Any, str]] = [
        ([1.0, 2.0, 3.0], [1.0, 2.0], "2 targets for 3 inputs"),
        ([1.0, 2.0], [1.0, float("nan")], "targets hold NaN or infinity, first at position 1"),
        ([1.0, 2.0], ["a", "b"], "targets cannot be converted to one tensor"),
        (np.zeros((2, 2)), [1.0, 2.0], r"inputs are \[2, 2\]; the run was trained on single numbers"),
        ([1.0, 2.0], [True, False], r"targets are torch\.bool"),
    ]
    for inputs, targets, message in cases:
        with pytest.raises(DataError, match=message):
            learner.adapt(inputs, targets)
    learner.adapt([1.0, 2.0], [1.0, 2.0])
    with pytest.raises(RunError, match="no classes, and so no probabilities; use predict"):
        learner.predict_proba([1.0])
    with pytest.raises(DataError, match="1 target for 2 inputs"):
        learner.score([1.0, 2.0], [1.0])


@pytest.mark.parametrize("base", [SMALL, SINUSOID], ids=["glyphs", "sinusoid"])
def test_example_shape_equals_sampler_shape(base: list[str]) -> None:
    config = train_config(*base)
    assert example_shape(config.data) == build_experiment(config).train.example_shape
