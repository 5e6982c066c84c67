"""Text into Markdown, such that nothing in a name, a reason or a command can be taken for markup."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

_MARKS = re.compile(r"([\\`*_\[\]])")
_AS_ENTITIES = {"|": "&#124;", "~": "&#126;"}  # a backslash does not protect them in all dialects


def escape(text: str) -> str:
    """On one line: Markdown's marks behind backslashes, HTML's and those of tables as entities."""
    printable = "".join(character if character.isprintable() else " " for character in text)
    escaped = _MARKS.sub(r"\\\1", html.escape(" ".join(printable.split()), quote=False))
    for mark, entity in _AS_ENTITIES.items():
        escaped = escaped.replace(mark, entity)
    return escaped


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Names at the left, figures at the right."""
    lines = [header, [":---", *["---:"] * (len(header) - 1)], *([escape(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def preformatted(text: str) -> str:
    """As it stands, in HTML, which Markdown leaves alone."""
    return f"<pre>{html.escape(text.strip(), quote=False)}</pre>"


def details(summary: str, block: str) -> str:
    """A block that is folded away."""
    return f"<details>\n<summary>{html.escape(summary, quote=False)}</summary>\n\n{block}\n\n</details>"
