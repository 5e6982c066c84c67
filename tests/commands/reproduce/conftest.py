"""Fixtures of the tests of reproduced rows."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _omniglot_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Create the folder that the configuration looks for."""
    (tmp_path / "data" / "omniglot-py" / "images_background").mkdir(parents=True)
    monkeypatch.setenv("METALEARN_DATA", str(tmp_path / "data"))


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use a temporary folder instead of the repository."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
