"""Fixtures of all tests: seeds, one thread, a cache, and what not every machine has."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from metalearn import configure_malloc
from tests.paths import REPO

MATHEMATICS = ("core", "derivatives", "models", "inner", "metagrad", "test_algorithms.py")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run the mathematics first; each worker of pytest-xdist begins with a stretch of its own, all of equal length."""
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    mathematics: dict[Path, list[pytest.Item]] = {}
    others = []
    for item in items:
        if item.path.relative_to(REPO / "tests").parts[0] in MATHEMATICS:
            mathematics.setdefault(item.path, []).append(item)
        else:
            others.append(item)
    stretches: list[list[pytest.Item]] = [[] for _ in range(workers)]
    for file in mathematics.values():
        min(stretches, key=len).extend(file)
    for number, stretch in enumerate(stretches):
        room = len(items) * (number + 1) // workers - sum(map(len, stretches[: number + 1]))
        stretch += others[: max(room, 0)]
        del others[: max(room, 0)]
    items[:] = itertools.chain(*stretches, others)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Use one thread: the models are small, and on a busy machine threads wait for each other for minutes."""
    torch.set_num_threads(1)
    configure_malloc()  # as the commands do


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _activated() -> Iterator[None]:
    """Find this environment's programs first, as a shell does in which it is activated."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
        yield


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the tests away from the user's cache; all workers share an empty one, as reading Omniglot takes long."""
    base = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METALEARN_CACHE", str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"))
        yield


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


@pytest.fixture
def code_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Work in an empty folder, of which modules may be imported; they are forgotten after the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for module in tmp_path.glob("*.py"):
        sys.modules.pop(module.stem, None)
