"""Reprs of public objects are short, name every tensor's shape, and leave defaults out."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import metalearn
import metalearn.data
from metalearn import Adam, Algorithm, Episodes, InnerLoop, Learner, MetaGradient, Momentum, functionalize
from metalearn.algorithms import ALGORITHMS
from metalearn.core.functional import ModuleForward
from metalearn.core.module_parts import module_parts
from metalearn.data.glyphs import make_glyphs
from metalearn.data.image_decoding import FolderImages
from metalearn.data.omniglot import OmniglotImages
from metalearn.data.sampler import EpisodeSampler, TaskShape
from metalearn.data.splits import ClassSizes, ImageSplits
from metalearn.models import Conv4, ResNet12

IMAGES = make_glyphs(classes=30, drawings=20)
EPISODES = EpisodeSampler(IMAGES, TaskShape(5, 1, 3), seed=0, split="train").tasks(0, 8)
NAMES = [f"images/class {i:02}" for i in range(30)]
GRADIENT = MetaGradient(
    loss=torch.tensor(1.25),
    grads=functionalize(ResNet12(5, widths=(4, 4, 4, 4)))[1],
    predictions=torch.zeros(8, 15, 5),
    support_loss=torch.zeros(3),
    diagnostics={"cg_residual": torch.tensor(0.5)},
)
SIZES = [20] * 30
EXAMPLES: list[Any] = [
    EPISODES,
    GRADIENT,
    ImageSplits("glyphs", IMAGES, IMAGES[:9], IMAGES[:8]),
    ImageSplits("own", IMAGES.flatten(0, 1), IMAGES[0], IMAGES[1], ClassSizes(SIZES, [20], [20])),
    EpisodeSampler(IMAGES.flatten(0, 1), TaskShape(5, 1, 3), 0, "train", SIZES),
    FolderImages(IMAGES[:, 0], NAMES, NAMES, [Path(f"{name}/image.png") for name in NAMES]),
    OmniglotImages(IMAGES, NAMES, NAMES),
]
OTHERS: list[Any] = [
    functionalize(Conv4(5))[0],
    *(ALGORITHMS[name](InnerLoop(0.4, 1), module_parts(Conv4(5))) for name in ("maml", "maml_pp", "boil", "reptile")),
]


def public_classes() -> Iterator[type]:
    """Yield the public dataclasses and named tuples of ``metalearn`` and of every module of ``metalearn.data``."""
    modules = [f"metalearn.data.{module.name}" for module in pkgutil.iter_modules(metalearn.data.__path__)]
    everything = {name: getattr(metalearn, name) for name in metalearn.__all__ if name not in metalearn._RENAMED}
    for module in modules:
        everything |= {name: v for name, v in vars(importlib.import_module(module)).items() if name[0] != "_"}
    for found in everything.values():
        if inspect.isclass(found) and (dataclasses.is_dataclass(found) or issubclass(found, tuple)):
            yield found


def holds_tensors(kind: type) -> bool:
    """Return whether a class has a field that its annotation says to hold a tensor."""
    annotations = inspect.get_annotations(kind).values()
    return any(word in str(a) for a in annotations for word in ("Tensor", "Params", "Examples"))


def test_every_public_class_that_holds_tensors_has_an_example() -> None:
    found = {kind for kind in public_classes() if holds_tensors(kind)}
    assert {EpisodeSampler, Episodes, FolderImages, ImageSplits, Learner, MetaGradient} <= found, "the sweep sees them"
    assert found - {Learner} == {type(example) for example in EXAMPLES}  # learners: tests/inference/test_learner.py


@pytest.mark.parametrize("example", [*EXAMPLES, *OTHERS], ids=lambda example: type(example).__name__)
def test_repr_is_short_and_names_shapes(example: Any) -> None:
    text = repr(example)
    assert len(text) < 400
    assert "\n" not in text
    assert " at 0x" not in text
    values = example._asdict() if hasattr(example, "_asdict") else vars(example)
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    assert all(f"{name}={str(t.dtype)[6:]}{list(t.shape)}" in text for name, t in tensors.items())
    assert text.endswith(", on cpu)") == bool(tensors)


def test_repr_of_episodes_names_two_devices() -> None:
    episodes = dataclasses.replace(EPISODES)
    object.__setattr__(episodes, "query_x", EPISODES.query_x.to("meta"))
    assert repr(episodes) == (
        "Episodes(support_x=float32[8, 5, 1, 28, 28], support_y=int64[8, 5], query_x=float32[8, 15, 1, 28, 28], "
        "query_y=int64[8, 15], on cpu and meta)"
    )


def test_repr_of_a_meta_gradient_has_the_loss_and_some_of_the_gradients() -> None:
    text = repr(GRADIENT)
    assert text.startswith("MetaGradient(loss=float32[]=1.25, grads={'")
    assert text.endswith(" support_loss=float32[3], diagnostics={'cg_residual': float32[]=0.5}, on cpu)")
    assert text.count("float32[4") > 1
    assert "...}" in text
    few = dataclasses.replace(GRADIENT, grads={"weight": torch.zeros(2, 3)}, diagnostics={})
    assert "grads={'weight': float32[2, 3]}, " in repr(few)
    assert "diagnostics" not in repr(few)


@pytest.mark.parametrize(
    "text",
    [
        "InnerLoop(lr=0.4, steps=1)",
        "InnerLoop(lr=0.1, steps=5, second_order=False, engine='adjoint')",
        "InnerLoop(lr=0.1, steps=2, rule=Momentum(momentum=0.5, nesterov=True), query_weights=(0.0, 0.5, 0.5))",
        "InnerLoop(lr=0.1, steps=2, rule=Adam(), adapted_params=frozenset({'weight'}))",
    ],
)
def test_repr_of_an_inner_loop_is_the_call_that_makes_it(text: str) -> None:
    made = eval(text, {"InnerLoop": InnerLoop, "Momentum": Momentum, "Adam": Adam})
    assert repr(made) == text


def test_repr_of_an_algorithm_holds_that_of_its_inner_loop() -> None:
    assert repr(Algorithm("maml", InnerLoop(0.4, 1))) == "Algorithm(name='maml', inner=InnerLoop(lr=0.4, steps=1))"


def test_repr_of_a_pure_function_names_its_module() -> None:
    forward, _ = functionalize(Conv4(5))
    assert isinstance(forward, ModuleForward)
    assert repr(forward) == "ModuleForward(module=Conv4(...))"


def test_repr_within_vmap_has_no_value() -> None:
    texts: list[str] = []

    def note(x: Tensor) -> Tensor:
        texts.append(repr(MetaGradient(x.sum(), {}, x, x)))
        return x

    torch.vmap(note)(torch.ones(2, 3))
    assert texts[0].startswith("MetaGradient(loss=float32[], ")
    assert "loss=int64[]=12345" in repr(MetaGradient(torch.tensor(12345), {}, torch.ones(1), torch.ones(1)))
