"""The report of a comparison: Markdown with linked plots, one HTML file that needs no network, and TensorBoard."""

from __future__ import annotations

import base64
import io
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import markdown
import numpy as np
import rich
import torch
from numpy.typing import NDArray
from PIL import Image

from metalearn.commands.compare.markdown_report import HTML, render_markdown, render_summary, title
from metalearn.commands.compare.plots import plots
from metalearn.commands.compare.results import Results
from metalearn.commands.compare.summary import headline, missing_runs
from metalearn.commands.compare.tables import variant_rows
from metalearn.commands.compare.variants import Job
from metalearn.config.output_names import RESULTS_FILE
from metalearn.config.schema import result_keys
from metalearn.core import serialization as files
from metalearn.training.tracking.console import print_line, print_path, print_table
from metalearn.training.tracking.event_files import EVENT_FILES
from metalearn.training.tracking.plot_style import metalearn_style
from metalearn.training.tracking.tensorboard import EventWriter, Value, experiment_summary

REPORT_RUN = "report"
"""The folder of the report's own event file, a run in TensorBoard."""

_PLOTS_DIR = "plots"
_WIDE = 140  # characters
_ONLY_IF_WIDE = ("non-transductive", "training time")


@metalearn_style()
def write_report(results: Results, folder: Path) -> Path:
    """Write ``report.md``, ``report.html`` and ``plots/`` over those of an earlier report.

    Args:
        results: of the comparison.
        folder: of the comparison, which TensorBoard can be pointed at as well.

    Returns:
        ``report.html``.
    """
    links, embedded = {}, {}
    for name, figure in plots(results).items():
        vector, pixels = io.StringIO(), io.BytesIO()
        figure.savefig(vector, format="svg", metadata={"Date": None})  # the same results make the same file
        figure.savefig(pixels, format="png")
        files.atomic_write_text(folder / _PLOTS_DIR / f"{name}.svg", vector.getvalue())
        files.atomic_write_bytes(folder / _PLOTS_DIR / f"{name}.png", pixels.getvalue())
        links[name] = f"{_PLOTS_DIR}/{name}.png"
        embedded[name] = f"data:image/svg+xml;base64,{base64.b64encode(vector.getvalue().encode()).decode()}"
    files.atomic_write_text(folder / "report.md", render_markdown(results, folder, links))
    body = markdown.markdown(render_markdown(results, folder, embedded), extensions=["tables"])
    page = folder / "report.html"
    files.atomic_write_text(page, HTML.get_template("report.html.j2").render(title=title(results), body=body))
    for path in (folder / _PLOTS_DIR).glob("*.*g"):
        if path.suffix in (".png", ".svg") and path.stem not in links:
            path.unlink()  # of an earlier report
    return page


def write_results(results: Results, every: Sequence[Job], folder: Path) -> None:
    """Write the report, also for TensorBoard, and at last ``results.json``, which marks the comparison as ended."""
    write_report(results, folder)
    pictures = {
        path.stem: np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.glob(f"{_PLOTS_DIR}/*.png"))
    }
    runs = [result_keys(job.config) for job in every]
    ReportLogger(folder / REPORT_RUN).log_report(render_summary(results), pictures, runs=runs)
    content = {"complete": results.complete, "torch": str(torch.__version__), **asdict(results)}
    files.atomic_write_text(folder / RESULTS_FILE, json.dumps(content, indent=2) + "\n")


def print_results(results: Results, folder: Path) -> None:
    """Print the table of the variants, the headline, and where the report is."""
    header, rows = variant_rows(results)
    if rich.get_console().width < _WIDE:
        columns = [i for i, name in enumerate(header) if name not in _ONLY_IF_WIDE]
        header = ["\n".join(header[i].rsplit(" ", 1)) for i in columns]
        # Shorten the time to the target to the time; the first column is a name, which may hold commas.
        rows = [[row[i].partition(",")[0] if i else row[i] for i in columns] for row in rows]
    print_table(f"{results.title}, {results.iterations} meta-steps, seeds {results.seeds}", header, rows)
    for sentence in headline(results):
        print_line(sentence)
    for _, run in missing_runs(results, "failed"):
        print_line(f"{run.folder} failed: {run.reason}")
    if not results.complete:
        print_line("Not every run is finished. The same command tries those again, and trains no other.")
    print_path("Report", folder / "report.html")
    print_line(f"TensorBoard: tensorboard --logdir {shlex.quote(str(folder))}")


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
