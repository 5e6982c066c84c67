"""Read the JSON files of runs and comparisons, as ``metrics.json``, which marks a run as finished. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from metalearn.core.errors import RunError


def read_json(path: Path, what: str, remedy: str, *, required: Iterable[str] = ()) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: of the file.
        what: it holds, for the message.
        remedy: a sentence for the message.
        required: names that it has.

    Raises:
        FileNotFoundError: if there is no such file.
        RunError: if it is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
        if missing := [name for name in required if name not in content]:
            raise ValueError(f"{missing[0]} is missing")
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} does not hold {what} ({error}). {remedy}") from error
    return content


def read_metrics(run_dir: Path, *, required: Iterable[str] = ("test.ci95",)) -> dict[str, Any] | None:
    """Return the metrics of a finished run; ``None`` for one that is not finished.

    Raises:
        RunError: if ``metrics.json`` is damaged, or lacks a required metric.
    """
    again = "the command that made the run tests it again (train: with run.resume=true)"
    remedy = f"Remove the file, and {again}; or restore it."
    try:
        return read_json(run_dir / "metrics.json", "the metrics of a finished run", remedy, required=required)
    except FileNotFoundError:
        return None
