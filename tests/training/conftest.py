"""Fixtures of the training tests."""

from __future__ import annotations

import pytest

from metalearn.data import metadata


@pytest.fixture(autouse=True)
def _no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "_has_network", lambda: False)
