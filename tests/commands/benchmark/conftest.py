"""Small reports of the benchmarks."""

from __future__ import annotations

import pytest

from metalearn.commands.benchmark import report


@pytest.fixture(autouse=True)
def _keep_malloc_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "configure_malloc", lambda: False)  # it would last for later tests
