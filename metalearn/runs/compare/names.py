"""What variants and comparisons are called on disk and in legends. Imports neither torch nor Hydra."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from metalearn.runs.folders import is_locked

RECORD = "comparison.yaml"
"""The file that makes a folder a comparison's: its configuration."""
RESULTS = "results.json"
"""The file that a comparison writes when all of its runs have ended."""

_MAY_DIFFER = {("compare", "jobs"), ("compare", "resume"), ("run", "resume")}
_LONGEST = 120


def split(variant: str) -> list[str]:
    """The overrides of a variant, as a shell would split them."""
    return shlex.split(variant)


def variant_name(variant: str) -> str:
    """``first_order`` for ``inner.second_order=false``; ``engine-adjoint,steps-5`` for these two keys."""
    words = []
    for override in split(variant):
        key, _, value = override.partition("=")
        if key == "inner.second_order" and value.lower() in ("true", "false"):
            words.append("second_order" if value.lower() == "true" else "first_order")
        else:
            words.append(f"{key.rpartition('.')[2]}-{value}")
    return re.sub(r"[^\w.,+-]", "_", ",".join(words)) or "base"


def comparison_folder(parent: Path, config: dict[str, Any], moment: str) -> str:
    """Where a comparison goes, below ``parent``: an unfinished one of the same configuration, or a folder of its own.

    Args:
        parent: of all comparisons on the same tasks.
        config: resolved.
        moment: makes a new folder's name unique.
    """
    if config["compare"]["resume"]:
        found = sorted(path.parent for path in parent.glob(f"*/{RECORD}"))
        for folder in reversed(found):
            begun = not (folder / RESULTS).exists() and not is_locked(folder)
            if begun and identity(read_record(folder)) == identity(config):
                return folder.name
    names = "-vs-".join(variant_name(variant) for variant in config["compare"]["variants"])
    return f"{names[:_LONGEST]}-{moment}"


def read_record(folder: Path) -> dict[str, Any]:
    """The configuration in a comparison's folder; empty if it cannot be read."""
    try:
        content = yaml.safe_load((folder / RECORD).read_text())
    except (OSError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def identity(config: dict[str, Any]) -> dict[tuple[str, str], Any]:
    """The values that make it the same comparison."""
    return {
        (section, name): value
        for section, values in config.items()
        for name, value in values.items()
        if (section, name) not in _MAY_DIFFER
    }


def folders_of(variants: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """Names of all run folders of a comparison."""
    return [f"{variant_name(variant)}-seed{seed}" for seed in seeds for variant in variants]
