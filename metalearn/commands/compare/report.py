"""The report of a comparison: Markdown with linked plots, and one HTML file that opens anywhere without a network."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template

import markdown
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from metalearn.commands.compare.markdown_report import PLOTS, render_markdown, title
from metalearn.commands.compare.plots import plots
from metalearn.commands.compare.results import Results
from metalearn.core import serialization as files
from metalearn.training.tracking.event_files import EVENT_FILES
from metalearn.training.tracking.tensorboard import EventWriter, Value, experiment_summary

_DPI = 150
# User text cannot hold a tag: it is escaped.
_IMAGE = re.compile(rf'(?P<before><img [^>]*src="){PLOTS}/(?P<name>\w+)\.png"')

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #1d1d1f; --paper: #ffffff; --faint: #6a6a6f; --line: #d8d8dd; --box: #f5f5f7;
  --warning: #fdf0e4; --edge: #d55e00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8ea; --paper: #17181a; --faint: #a0a0a6; --line: #3a3b3f;
  --box: #222327; --warning: #33261a; --edge: #e69f00; } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 68rem;
  margin: 2rem auto; padding: 0 1.2rem; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.25; }
h2 { font-size: 1.3rem; margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin-top: 2rem; }
table { display: block; overflow-x: auto; border-collapse: collapse; font-size: .875rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); overflow-wrap: normal; }
td { white-space: nowrap; }
th { min-width: 4.5rem; font-weight: 600; vertical-align: bottom; }
img { display: block; max-width: 100%; height: auto; background: #ffffff; border-radius: 4px; }
pre { background: var(--box); padding: .8rem 1rem; overflow-x: auto; font-size: .85rem; }
blockquote { margin: 1.2rem 0; padding: .2rem 1rem; background: var(--warning); border-left: 4px solid var(--edge); }
summary { cursor: pointer; }
@media print { :root { color-scheme: light; --ink: #000000; --paper: #ffffff; } body { margin: 0; max-width: none; }
  table { display: table; font-size: .65rem; } th, td { padding: .2rem .4rem; min-width: 0; white-space: normal; }
  img, tr, blockquote { break-inside: avoid; } h2, h3 { break-after: avoid; } pre { white-space: pre-wrap; } }
</style>
</head>
<body>
$body
</body>
</html>
""")


def write_report(results: Results, folder: Path) -> Path:
    """Write ``report.md``, ``report.html`` and ``plots/`` over those of an earlier report.

    Args:
        results: what was found.
        folder: of the comparison, which TensorBoard can be pointed at as well.

    Returns:
        ``report.html``.
    """
    drawn = plots(results)
    vectors = {name: _svg(figure) for name, figure in drawn.items()}
    for name, figure in drawn.items():
        files.atomic_write_text(folder / PLOTS / f"{name}.svg", vectors[name])
        files.atomic_write_bytes(folder / PLOTS / f"{name}.png", _png(figure))
    text = render_markdown(results, folder, drawn)
    files.atomic_write_text(folder / "report.md", text)
    page = folder / "report.html"
    files.atomic_write_text(page, _page(title(results), text, vectors))
    _remove_stale(folder / PLOTS, drawn)
    return page


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "metalearn"}):  # the same results make the same file
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def _page(name: str, text: str, vectors: dict[str, str]) -> str:
    """The Markdown as a page of its own, its images inside."""

    def inlined(image: re.Match[str]) -> str:
        data = base64.b64encode(vectors[image["name"]].encode()).decode()
        return f'{image["before"]}data:image/svg+xml;base64,{data}"'

    body = markdown.markdown(text, extensions=["tables"])
    return _PAGE.substitute(title=html.escape(name), body=_IMAGE.sub(inlined, body))


def _remove_stale(folder: Path, drawn: dict[str, Figure]) -> None:
    """Plots of an earlier report that this one has no data for."""
    for path in [*folder.glob("*.png"), *folder.glob("*.svg")]:
        if path.stem not in drawn:
            path.unlink()


class ReportLogger(EventWriter):
    """Writes the event file of a comparison's report, over that of an earlier report.

    Args:
        folder: of the report, next to those of the runs.
    """

    def __init__(self, folder: Path) -> None:
        for path in folder.glob(EVENT_FILES):
            path.unlink()
        super().__init__(folder)

    def log_report(
        self, markdown: str, images: Mapping[str, NDArray[np.uint8]], *, runs: Sequence[Mapping[str, Value]]
    ) -> None:
        """Log the report, and the columns of the HParams table.

        Args:
            markdown: of the report.
            images: ``[height, width, 3]`` by name.
            runs: dotted keys of every run's configuration.
        """
        self.add_summary(experiment_summary(runs))
        self.log_text("report", markdown)
        for name, image in images.items():
            self.log_image(f"report/{name}", image)
