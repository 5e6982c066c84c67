"""Which of the other libraries can be imported here."""

from __future__ import annotations

import importlib
import importlib.util
import io
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr

from torch import nn

from metalearn.core.types import Episodes, MetaGradient
from metalearn.inner import InnerLoop

Peer = Callable[[nn.Module, Episodes, InnerLoop], MetaGradient]
"""``metalearn.meta_gradient``, of a module at its own parameters."""

PEERS = {"learn2learn": "learn2learn", "higher": "higher", "TorchOpt": "torchopt"}
"""The other libraries, and their modules in ``metalearn.metagrad.baselines``, which are named like what they import."""

NOT_INSTALLED = "not installed"


def installed_peers(modules: Mapping[str, str] = PEERS) -> tuple[dict[str, Peer], dict[str, str]]:
    """The libraries that can be compared with, and why the others cannot: ``NOT_INSTALLED``, or what broke."""
    peers: dict[str, Peer] = {}
    missing: dict[str, str] = {}
    for name, module in modules.items():
        try:
            with redirect_stderr(io.StringIO()):  # gym, which learn2learn imports, says there that it is unmaintained
                peers[name] = importlib.import_module(f"metalearn.metagrad.baselines.{module}").meta_gradient
        except ImportError as error:
            there = importlib.util.find_spec(module) is not None
            missing[name] = f"cannot be imported ({error})" if there else NOT_INSTALLED
    return peers, missing
