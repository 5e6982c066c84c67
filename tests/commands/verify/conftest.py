"""A console that keeps lines whole."""

from __future__ import annotations

import pytest
import rich
from rich.console import Console


@pytest.fixture(autouse=True)
def _wide_console(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the lines that tests search for unbroken."""
    monkeypatch.setattr(rich, "_console", Console(width=200))
