"""Images, labels and networks shared by the tests of inference."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from metalearn import Params
from metalearn.core import serialization as files
from metalearn.data.glyphs import make_glyphs
from metalearn.models import Conv4
from metalearn.training.checkpoints import best_path

SUPPORT, QUERY = make_glyphs(classes=7, drawings=4, seed=9).split([2, 2], dim=1)
NAMES = ["f", "e", "d", "c", "b", "a", "g"]


def support(ways: int = 5) -> tuple[Tensor, list[str]]:
    """Two images of each class, ``[2 ways, 1, 28, 28]`` uint8, and their labels, which are not in sorted order."""
    return SUPPORT[:ways].flatten(0, 1), [name for name in NAMES[:ways] for _ in range(2)]


def query(ways: int = 5) -> Tensor:
    images: Tensor = QUERY[:ways].flatten(0, 1)
    return images


def checkpoint(run: Path) -> Params:
    params: Params = files.load_checked(best_path(run))["params"]
    return params


def network(theta: Params) -> Conv4:
    """Conv4 with a checkpoint's parameters."""
    module = Conv4(len(theta["head.bias"]), width=8)
    module.load_state_dict({name: p for name, p in theta.items() if "::" not in name})
    return module


def scaled(images: Tensor) -> Tensor:
    floating: Tensor = images.float() / 255
    return floating
