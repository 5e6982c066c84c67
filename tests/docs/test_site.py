"""The documentation site builds without a warning."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import REPO

pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install -e '.[docs]'")


def test_site_builds_strictly(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # of the theme's, about a later mkdocs
    done = subprocess.run(build, cwd=REPO, env=quiet, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    for page in ("index.html", "reference/api/index.html", "lessons/hvp/index.html", "results/index.html"):
        assert (tmp_path / "site" / page).is_file()
    api = (tmp_path / "site" / "reference" / "api" / "index.html").read_text()
    assert "Compute the mean query loss over tasks after adaptation" in api
