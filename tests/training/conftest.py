"""Fixtures of the training tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from metalearn.data import metadata
from tests.training.run_folders import AT_VALIDATIONS, run


@pytest.fixture(autouse=True)
def _no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "_has_network", lambda: False)


@pytest.fixture(scope="package")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run with ``AT_VALIDATIONS``; not to be changed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(folder, *AT_VALIDATIONS)
    return folder
