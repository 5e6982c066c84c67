"""Runs shared by the tests of inference."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.training.run_folders import SINUSOID, trained, untrained


@pytest.fixture(autouse=True, scope="package")
def _shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METALEARN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="package")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("runs") / "maml")


@pytest.fixture(scope="package")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Untrained checkpoints of other algorithms, by name."""
    folder = tmp_path_factory.mktemp("runs")
    names = ["anil", "boil", "meta_sgd", "meta_curvature", "reptile", "maml_pp", "imaml", "protonet", "cavia"]
    return {name: untrained(folder / name, f"algorithm={name}") for name in names}


@pytest.fixture(scope="package")
def sinusoid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained(tmp_path_factory.mktemp("runs") / "sinusoid", base=SINUSOID)
