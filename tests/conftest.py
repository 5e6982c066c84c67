"""What several tests share: small episodes and models in float64, and where the optional inputs are."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from metalearn import Episodes

REPO = Path(__file__).parents[1]
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
    """The tests' models are small: more threads only wait for each other, for minutes on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests neither read nor write the user's cache; they share one of their own."""
    folder = tmp_path_factory.getbasetemp() / "cache"
    folder.mkdir(exist_ok=True)
    monkeypatch.setenv("METALEARN_CACHE", str(folder))


def image_episodes(
    *,
    tasks: int = 3,
    ways: int = 3,
    shots: int = 1,
    queries: int = 2,
    size: int = 28,
    dtype: torch.dtype = torch.float64,
) -> Episodes:
    """Random images with labels in class order."""
    labels = torch.arange(ways)
    return Episodes(
        support_x=torch.rand(tasks, ways * shots, 1, size, size, dtype=dtype),
        support_y=labels.repeat_interleave(shots).repeat(tasks, 1),
        query_x=torch.rand(tasks, ways * queries, 1, size, size, dtype=dtype),
        query_y=labels.repeat_interleave(queries).repeat(tasks, 1),
    )


@pytest.fixture
def omniglot_root() -> str:
    """A real copy of Omniglot, from METALEARN_DATA."""
    root = os.environ.get("METALEARN_DATA")
    if not root or not Path(root).is_dir():
        pytest.skip("no Omniglot here: set METALEARN_DATA to a folder that holds omniglot-py/")
    return root


@pytest.fixture(scope="module")
def cache_of_the_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache that the runs of a whole module share, and nobody else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METALEARN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
