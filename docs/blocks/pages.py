"""Blocks in pages, from ``<!-- NAME WORDS -->`` to ``<!-- /NAME -->``: each is written by ``NAME(*WORDS)``.

The words may be missing. A block is a paragraph, a table, or a part of a line. ``python -m docs.blocks`` writes them
all; ``tests/docs/test_blocks.py`` fails where one is out of date.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from docs.blocks import accuracy, cost, lessons, reference
from docs.blocks.markdown import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(r"<!-- (?P<name>\w+)(?P<words>(?: [\w./=-]+)*) -->(?P<content>.*?)<!-- /(?P=name) -->", re.DOTALL)
_MARK = re.compile(r"<!-- /?\w+[^>]*-->")


def blocks() -> dict[str, Callable[..., str]]:
    """Return every function that writes a block, by its name: the public ones of these modules that return a string."""
    return {
        name: function
        for module in (accuracy, cost, lessons, reference)
        for name, function in vars(module).items()
        if getattr(function, "__module__", None) == module.__name__
        and not name.startswith("_")
        and function.__annotations__.get("return") == "str"
    }


def filled(text: str, page: Path) -> str:
    """Return a page with every block written anew.

    Raises:
        ValueError: if a mark belongs to no block, or a block to no function.
    """
    writers = blocks()

    def write(found: re.Match[str]) -> str:
        name = found["name"]
        if name not in writers:
            raise ValueError(
                f"{page}: {found[0][:60]!r}: nothing writes this block; docs/blocks/ has {sorted(writers)}."
            )
        space = "\n" if found["content"].startswith("\n") else ""
        return f"<!-- {name}{found['words']} -->{space}{writers[name](*found['words'].split())}{space}<!-- /{name} -->"

    if strays := _MARK.findall(_BLOCK.sub("", text)):
        raise ValueError(f"{page}: {strays[0]}: this mark has no other end.")
    return _BLOCK.sub(write, text)
