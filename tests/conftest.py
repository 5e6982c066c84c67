"""Fixtures of all tests: seeds, one thread, a cache, and what not every machine has."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Use one thread: the models are small, and on a busy machine threads wait for each other for minutes."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the tests away from the user's cache; they share an empty one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METALEARN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def learn2learn_installed() -> None:
    """Skip the test where learn2learn is missing; on CI that is a failure."""
    if importlib.util.find_spec("learn2learn") is None:
        if os.environ.get("CI") and sys.version_info >= (3, 11):
            pytest.fail("learn2learn is not installed on CI, so nothing is compared with it")
        pytest.skip("learn2learn is not installed: pip install -r requirements-peers.txt")


@pytest.fixture
def omniglot_root() -> str:
    """Return the folder of a copy of Omniglot, from METALEARN_DATA."""
    root = os.environ.get("METALEARN_DATA")
    if not root or not Path(root).is_dir():
        pytest.skip("no Omniglot here: set METALEARN_DATA to a folder that holds omniglot-py/")
    return root


@pytest.fixture(scope="session")
def uninterrupted_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the small training of ``tests.faults.runs``, trained without a fault."""
    from tests.faults.runs import train

    return train(tmp_path_factory.mktemp("uninterrupted"))
