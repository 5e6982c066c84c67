"""The other libraries, for tests that go through each of them."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from typing import Protocol

import pytest
from torch import nn
from torch.nn.functional import cross_entropy

from metalearn import Episodes, InnerLoop, Loss, MetaGradient, Params

LIBRARIES = ("learn2learn", "higher", "torchopt")


class PeerAt(Protocol):
    """A peer's ``meta_gradient``."""

    def __call__(
        self,
        module: nn.Module,
        episodes: Episodes,
        inner: InnerLoop,
        *,
        loss: Loss = cross_entropy,
        params: Params | None = None,
    ) -> MetaGradient: ...


def peer_at(name: str) -> PeerAt:
    """A library's, or by hand. Skips where the library is missing; on CI that is a failure."""
    if name in LIBRARIES and importlib.util.find_spec(name) is None:
        if os.environ.get("CI") and sys.version_info >= (3, 11):
            pytest.fail(f"{name} is not installed on CI, so nothing is compared with it")
        pytest.skip(f"{name} is not installed: pip install -r requirements-peers.txt")
    found: PeerAt = importlib.import_module(f"metalearn.metagrad.baselines.{name}").meta_gradient
    return found
