"""Configurations of this machine alone: no Omniglot, and no network."""

from __future__ import annotations

import pytest

from metalearn.data import metadata


@pytest.fixture(autouse=True)
def _no_omniglot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("METALEARN_DATA", raising=False)
    monkeypatch.setattr(metadata, "_has_network", lambda: False)
