"""Every fault of the suite: a few attempts by default, all of them with ``-m slow``."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.rows import ROWS
from tests.faults.suite import Row


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


def attempts(*, short: bool) -> list[object]:
    return [
        pytest.param(row, i, id=f"{row.name}-{i}")
        for row in ROWS
        for i in (row.short if short else sorted(set(range(row.tries)) - set(row.short)))
    ]


@pytest.mark.parametrize(("row", "i"), attempts(short=True))
def test_fault(row: Row, i: int, tmp_path: Path, shared: Path) -> None:
    row.attempt(i, tmp_path, shared)


@pytest.mark.slow
@pytest.mark.parametrize(("row", "i"), attempts(short=False))
def test_fault_again(row: Row, i: int, tmp_path: Path, shared: Path) -> None:
    row.attempt(i, tmp_path, shared)
