"""The report of a comparison as Markdown; its text is in ``templates/``."""

from __future__ import annotations

import html
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from metalearn.commands.compare import tables
from metalearn.commands.compare.plots import INTERVAL, PLOTS
from metalearn.commands.compare.results import Results
from metalearn.commands.compare.summary import headline, missing_runs

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
    """Return the whole report as Markdown.

    Args:
        results: of the comparison.
        folder: of the comparison, for TensorBoard.
        images: the path or address of each plot, by name.
    """
    overrides = [override for variant in results.variants for override in variant.overrides]
    cost_machine = {name: str(value) for name, value in results.cost_machine.items() if name in ("cpu", "gpu")}
    measured_elsewhere = any(str(results.machine.get(name)) != value for name, value in cost_machine.items())
    template = _MARKDOWN.get_template("report.md.j2")
    return template.render(
        title=title(results),
        results=results,
        headline=headline(results),
        runs_differ=any(override.startswith(_RUN_KEYS) for override in overrides),
        missing={
            "Failed runs": missing_runs(results, "failed"),
            "Unfinished runs": missing_runs(results, "unfinished"),
        },
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
        tensorboard=f"tensorboard --logdir {shlex.quote(str(folder))}",
    )
