"""Let pages show pictures of ``outputs/reference/`` and link to files outside; write equations as MathML."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_ROOT = Path(__file__).parents[1]
_OUTSIDE = re.compile(r"\]\((?:\.\./)+((?:outputs/reference|metalearn)/[^)#]+)")
_FOLDER = "repository"
_EQUATION = re.compile(r"\$\$(?P<block>[^$]+)\$\$|\$(?P<inline>[^$\n]+)\$")
_CODE = re.compile(r"(<pre.*?</pre>|<code.*?</code>|<script.*?</script>)", re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the files outside that pages name."""
    named = {found for page in files.documentation_pages() for found in _OUTSIDE.findall(page.content_string)}
    for path in sorted(named):
        files.append(File.generated(config, f"{_FOLDER}/{path}", abs_src_path=str(_ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Lead links to files outside to their copies in the site."""
    up = "../" * page.file.src_uri.count("/")
    return _OUTSIDE.sub(rf"]({up}{_FOLDER}/\1", markdown)


def on_page_content(content: str, page: Page, config: Any, files: Files) -> str:
    """Write the equations of notebooks as MathML, which browsers show without a script from elsewhere."""
    if not page.file.src_uri.endswith(".ipynb"):
        return content

    def mathml(found: re.Match[str]) -> str:
        latex, display = found["block"] or found["inline"], "block" if found["block"] else "inline"
        return convert(html.unescape(latex.strip()), display=display)

    parts = _CODE.split(content)
    return "".join(part if number % 2 else _EQUATION.sub(mathml, part) for number, part in enumerate(parts))
