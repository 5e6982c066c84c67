"""The pages of the lessons, as ``scripts/gradients.py`` wrote them."""

from __future__ import annotations

from typing import Any

from docs.blocks.markdown import read, table
from metalearn.commands.gradients import format_check
from metalearn.lessons import Check


def lesson(name: str) -> str:
    """Return a lesson: its claim, the lines that ran, its plots, every number, and what was measured."""
    found = next(one for one in read("lessons/lessons.json")["lessons"] if one["name"] == name)
    plots = [f"![{found['title']}](../../outputs/reference/lessons/{file})" for file in found["figures"]]
    notes = "\n".join(f"- {note}" for note in found["notes"])
    rows = ((check["what"], *format_check(_check(check))) for check in found["checks"])
    numbers = table(("number", "computed", "expected"), rows)
    parts = [
        found["claim"],
        f"```text\npython scripts/gradients.py lesson={name}\n```",
        f"## What ran\n\n```py\n{found['code']}\n```",
        *plots,
        *([f"## Measured here\n\n{notes}"] if notes else []),
        f"## Every number\n\n{numbers}",
    ]
    return "\n\n".join(parts)


def lessons() -> str:
    """List the lessons."""
    found = read("lessons/lessons.json")["lessons"]
    return table(("lesson", "numbers checked"), ((f"[{x['title']}]({x['name']}.md)", len(x["checks"])) for x in found))


def lessons_total() -> str:
    """Say how many lessons there are, and how many numbers they check."""
    found = read("lessons/lessons.json")["lessons"]
    return f"{len(found)} lessons, {sum(len(one['checks']) for one in found)} numbers"


def _check(entry: dict[str, Any]) -> Check:
    return Check(entry["what"], entry["computed"], entry["expected"], entry["tolerance"], entry["source"])
