"""The errors that metalearn may answer wrong input with."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

import metalearn
from metalearn.core.errors import MetalearnError


def assert_raised_by_metalearn(error: Exception) -> None:
    """Check that a ``raise`` statement of metalearn raised the error, and that its message names a value.

    Raises:
        AssertionError: the error came out of torch, Python or another library as it was.
    """
    if isinstance(error, MetalearnError):
        return
    origin = traceback.extract_tb(error.__traceback__)[-1]
    inside = Path(origin.filename).is_relative_to(Path(metalearn.__file__).parent)
    if not (isinstance(error, (ValueError, TypeError)) and inside and (origin.line or "").startswith("raise ")):
        raise AssertionError(f"raw from {origin.filename}: {type(error).__name__}: {error}") from error
    assert re.search(r"\d|is \w+|'|=\w|\(\)", str(error)), f"the message names no value: {error}"
