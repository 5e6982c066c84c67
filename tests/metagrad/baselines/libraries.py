"""The other libraries and small models, for tests of each library."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys

import pytest
from torch import nn

from metalearn.metagrad.baselines.common import Baseline
from metalearn.models import MLP

LIBRARIES = ("learn2learn", "higher", "torchopt")


def load_library(name: str) -> Baseline:
    """Import the ``meta_gradient`` of a library, or by hand; skip if the library is missing, and fail on CI."""
    if name in LIBRARIES and importlib.util.find_spec(name) is None:
        if os.environ.get("CI") and sys.version_info >= (3, 11):
            pytest.fail(f"{name} is not installed on CI, so nothing is compared with it")
        pytest.skip(f"{name} is not installed: pip install -r requirements-peers.txt")
    found: Baseline = importlib.import_module(f"metalearn.metagrad.baselines.{name}").meta_gradient
    return found


def mlp() -> nn.Module:
    """Return a small network with BatchNorm."""
    return MLP(4, 3, hidden=(6,)).double()


def smooth() -> nn.Module:
    """Return a small network without zero gradients."""
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
