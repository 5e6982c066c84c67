"""A ``~`` without a home folder is an error that says what to do."""

from __future__ import annotations

import pwd
from pathlib import Path

import pytest

from metalearn.core.errors import ConfigError
from metalearn.core.paths import expand_home
from metalearn.data.metadata import cache_dir
from tests.paths import REPO


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be a user without a passwd entry and HOME, as in some containers."""

    def unknown(user: object) -> None:
        raise KeyError(user)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME", "METALEARN_CACHE"):
        monkeypatch.delenv(name, raising=False)


def test_user_without_home(no_home: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="~/x: no home folder is known for the ~ in it; write the whole path, or set"):
        expand_home("~/x")
    with pytest.raises(ConfigError, match="set METALEARN_CACHE=FOLDER, or set HOME"):
        cache_dir()
    monkeypatch.setenv("METALEARN_CACHE", "/cache")
    assert cache_dir() == Path("/cache")
    monkeypatch.setenv("HOME", "/home")
    assert expand_home("~/x") == Path("/home/x")


def test_every_home_is_expanded_here() -> None:
    for path in (REPO / "metalearn").rglob("*.py"):
        assert path.name == "paths.py" or ".expanduser(" not in path.read_text(), path
