"""The report of a comparison: Markdown with linked plots, one HTML file that needs no network, and TensorBoard."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import markdown
import numpy as np
import rich
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from metalearn.commands.compare import tables
from metalearn.commands.compare.plots import INTERVAL, PLOTS, plots
from metalearn.commands.compare.results import Results
from metalearn.commands.compare.tables import headline, missing_runs, variant_rows
from metalearn.commands.compare.variants import Job
from metalearn.commands.output_folders import RESULTS_FILE
from metalearn.commands.shell import tensorboard
from metalearn.config.schema import result_keys
from metalearn.core import serialization as files
from metalearn.training.tracking.console import print_line, print_path, print_table
from metalearn.training.tracking.event_files import EVENT_FILES
from metalearn.training.tracking.plot_style import inline_svg, metalearn_style, stack_panels
from metalearn.training.tracking.tensorboard import EventWriter, Value, experiment_summary

_MAX_NAMES_IN_TITLE = 3
_RUN_KEYS = ("outer.iterations", "inner.steps", "experiment")  # of which the report speaks as if all runs shared them
_MEMORY = {
    "cuda": "as CUDA's allocator counted it",
    "cpu-tensors": "of live tensors on the CPU within one meta-step",
}
_SPECIAL = re.compile(r"([\\`*_\[\]])")
_ENTITIES = str.maketrans({"|": "&#124;", "~": "&#126;"})  # not all dialects of Markdown let a backslash escape them


def escape(text: object) -> Markup:
    """Return text as one line of Markdown in which nothing is markup; ``Markup`` is returned as it is."""
    if isinstance(text, Markup):
        return text
    printable = "".join(character if character.isprintable() else " " for character in str(text))
    line = html.escape(" ".join(printable.split()), quote=False)
    return Markup(_SPECIAL.sub(r"\\\1", line).translate(_ENTITIES))


def verbatim(text: str) -> Markup:
    """Return text for a ``<pre>`` element."""
    return Markup(html.escape(text.strip(), quote=False))


HTML = Environment(
    loader=PackageLoader("metalearn.commands.compare"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    undefined=StrictUndefined,
)
_MARKDOWN = HTML.overlay(finalize=escape)  # every expression in a template is escaped
_MARKDOWN.filters["verbatim"] = verbatim


def title(results: Results) -> str:
    """Return the report's title as plain text."""
    names = [variant.name for variant in results.variants]
    compared = " against ".join(names) if len(names) <= _MAX_NAMES_IN_TITLE else f"{len(names)} variants compared"
    return f"{results.title}: {compared}"


def render_summary(results: Results) -> str:
    """Return the headline and the table of the variants as Markdown."""
    template = _MARKDOWN.get_template("summary.md.j2")
    return template.render(headline=headline(results), variants=tables.variant_rows(results))


def render_markdown(results: Results, folder: Path, images: Mapping[str, str]) -> str:
    """Return the whole report as Markdown; ``images`` holds the path of each plot, by name."""
    overrides = [override for variant in results.variants for override in variant.overrides]
    cost_machine = {name: str(value) for name, value in results.cost_machine.items() if name in ("cpu", "gpu")}
    measured_elsewhere = any(str(results.machine.get(name)) != value for name, value in cost_machine.items())
    template = _MARKDOWN.get_template("report.md.j2")
    return template.render(
        title=title(results),
        results=results,
        headline=headline(results),
        runs_differ=any(override.startswith(_RUN_KEYS) for override in overrides),
        missing={f"{state.capitalize()} runs": missing_runs(results, state) for state in ("failed", "unfinished")},
        interval=INTERVAL,
        memory=_MEMORY.get(results.memory_kind, results.memory_kind),
        tables={
            "variants": tables.variant_rows(results),
            "per_step": tables.per_step_rows(results),
            "differences": tables.difference_rows(results),
            "memory": tables.memory_rows(results),
            "time": tables.time_rows(results),
            "runs": tables.run_rows(results),
        },
        other_machine=cost_machine.get("gpu", cost_machine.get("cpu")) if measured_elsewhere else None,
        images=images,
        plots=PLOTS,
        tensorboard=tensorboard(folder),
    )


REPORT_RUN = "report"
"""The folder of the report's own event file, a run in TensorBoard."""

_PLOTS_DIR = "plots"
_WIDE = 140  # characters
_ONLY_IF_WIDE = ("non-transductive", "training time")
_IMAGE = re.compile(rf'<img alt="[^"]*" src="({_PLOTS_DIR}/\w+\.png)" />')


@metalearn_style()
def write_report(results: Results, folder: Path) -> Path:
    """Write ``report.md``, ``report.html`` and ``plots/`` over those of an earlier report; return ``report.html``."""
    links, pictures = {}, {}
    for name, figure in plots(results).items():
        vector, pixels = io.StringIO(), io.BytesIO()
        figure.savefig(vector, format="svg", metadata={"Date": None})  # the same results make the same file
        figure.savefig(pixels, format="png")
        files.atomic_write_text(folder / _PLOTS_DIR / f"{name}.svg", vector.getvalue())
        files.atomic_write_bytes(folder / _PLOTS_DIR / f"{name}.png", pixels.getvalue())
        links[name] = f"{_PLOTS_DIR}/{name}.png"
        figure.suptitle("")  # in the page it is a heading
        wide = inline_svg(figure, f"wide-{name}", PLOTS[name].title, "wide")
        stack_panels(figure)
        pictures[links[name]] = wide + inline_svg(figure, f"narrow-{name}", PLOTS[name].title, "narrow")
    text = render_markdown(results, folder, links)
    files.atomic_write_text(folder / "report.md", text)
    body = markdown.markdown(text, extensions=["tables"])
    body = _IMAGE.sub(lambda image: pictures[image[1]], body)
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
    with ReportLogger(folder / REPORT_RUN) as tensorboard_logger:
        tensorboard_logger.log_report(render_summary(results), pictures, runs=runs)
    content = {"complete": results.complete, "torch": str(torch.__version__), **asdict(results)}
    files.atomic_write_json(folder / RESULTS_FILE, content)


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
    print_line(f"TensorBoard:\n  {tensorboard(folder)}")


class ReportLogger(EventWriter):
    """Writes the event file of a comparison's report, and then removes that of an earlier report."""

    def __init__(self, folder: Path) -> None:
        self._earlier = [*folder.glob(EVENT_FILES)]
        super().__init__(folder)

    def log_report(
        self, markdown: str, images: Mapping[str, NDArray[np.uint8]], *, runs: Sequence[Mapping[str, Value]]
    ) -> None:
        """Log the report, images ``[height, width, 3]``, and the columns of the HParams table from runs' keys."""
        self.add_summary(experiment_summary(runs, "accuracy"))
        self.log_text("report", markdown)
        for name, image in images.items():
            self.log_image(f"report/{name}", image)
        self.flush()
        for path in self._earlier:
            path.unlink()
