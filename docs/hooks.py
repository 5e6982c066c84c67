"""Let pages show pictures of ``outputs/reference/`` and link to files outside of ``docs/``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_ROOT = Path(__file__).parents[1]
_OUTSIDE = re.compile(r"\]\((?:\.\./)+((?:outputs/reference|metalearn)/[^)]+)\)")
_FOLDER = "repository"


def on_files(files: Files, config: Any) -> Files:
    """Add the files outside that pages name."""
    named = {found for page in files.documentation_pages() for found in _OUTSIDE.findall(page.content_string)}
    for path in sorted(named):
        files.append(File.generated(config, f"{_FOLDER}/{path}", abs_src_path=str(_ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Lead links to files outside to their copies in the site."""
    up = "../" * page.file.src_uri.count("/")
    return _OUTSIDE.sub(rf"]({up}{_FOLDER}/\1)", markdown)
