"""The report of a comparison as Markdown, section by section."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path

from metalearn.commands.compare.captions import CAPTIONS, INTERVAL
from metalearn.commands.compare.markup import details, escape, preformatted, table
from metalearn.commands.compare.results import Results
from metalearn.commands.compare.summary import headline, missing
from metalearn.commands.compare.tables import (
    difference_rows,
    memory_rows,
    per_step_rows,
    run_rows,
    time_rows,
    variant_rows,
)

PLOTS = "plots"  # the folder of the images, beside the report
_NAMED_IN_TITLE = 3
_CHANGE_A_RUN = ("outer.iterations", "inner.steps", "experiment")
_IN_ONE_PARAGRAPH = 4
_MEMORY = {
    "cuda": "as CUDA's allocator counted it",
    "cpu-tensors": "of live tensors on the CPU within one meta-step",
}


def title(results: Results) -> str:
    """Plain text."""
    names = [variant.name for variant in results.variants]
    what = " against ".join(names) if len(names) <= _NAMED_IN_TITLE else f"{len(names)} variants compared"
    return f"{results.title}: {what}"


def render_markdown(results: Results, folder: Path, plots: Iterable[str]) -> str:
    """All of the report; the plots are linked as ``plots/NAME.png``."""
    parts = [f"# {escape(title(results))}", _headline(results), _setup(results)]
    parts += _missing(results)
    parts += _variants(results)
    parts += _accuracies(results)
    parts += _costs(results)
    parts += _plots(plots)
    parts += ["## Runs", table(*run_rows(results))]
    parts += _origin(results, folder)
    return "\n\n".join(parts) + "\n"


def _headline(results: Results) -> str:
    sentences = [escape(sentence) for sentence in headline(results)]
    if len(sentences) <= _IN_ONE_PARAGRAPH:
        return " ".join(sentences)
    return "\n".join(f"- {sentence}" for sentence in sentences)


def _setup(results: Results) -> str:
    seeds = ", ".join(map(str, results.seeds))
    own = any(o.startswith(_CHANGE_A_RUN) for variant in results.variants for o in variant.overrides)
    start = "Unless a variant says otherwise, a run takes" if own else "Each run takes"
    return escape(
        f"{start} {results.iterations} meta-steps with K = {results.inner_steps} inner steps; "
        f"seed{'s' if len(results.seeds) > 1 else ''} {seeds}."
    )


def _missing(results: Results) -> list[str]:
    """Failed and unfinished runs in a box of their own, at the top, as they change what the figures mean."""
    blocks = []
    for state, words in {"failed": "Failed runs", "unfinished": "Unfinished runs"}.items():
        lines = []
        for variant, run in missing(results, state):
            reason = f": {run.reason}" if run.reason else ""
            lines.append(f"- {escape(f'{variant.name}, seed {run.seed}, in {run.folder}{reason}')}")
        if lines:
            blocks.append("\n".join([f"**{words}**: the figures below are without them.", "", *lines]))
    quoted = "\n\n".join(blocks).splitlines()
    return ["\n".join(f"> {line}".rstrip() for line in quoted)] if quoted else []


def _variants(results: Results) -> list[str]:
    memory = _MEMORY.get(results.memory_kind, results.memory_kind)
    note = f"{INTERVAL} Peak memory is the highest of the variant's runs, {memory}. Milliseconds are medians."
    if results.runs_at_a_time > 1:
        note += (
            f" {results.runs_at_a_time} runs shared the machine at a time, so times are rough: those under "
            "«Cost of one meta-gradient» are measured in turns."
        )
    if results.target_accuracy is not None:
        note += (
            f" Time to {results.target_accuracy:.1%} validation accuracy: training time and meta-steps, "
            "medians over the seeds that reached it."
        )
    overrides = [
        f"- {escape(variant.name)}: {escape(' '.join(variant.overrides)) or 'as configured'}"
        for variant in results.variants
    ]
    return ["## Variants", table(*variant_rows(results)), escape(note), "\n".join(overrides)]


def _accuracies(results: Results) -> list[str]:
    parts = []
    steps, accuracies = per_step_rows(results)
    if accuracies:
        parts += ["## Test accuracy after each inner step", table(steps, accuracies)]
    if results.differences:
        parts += ["## Differences", table(*difference_rows(results))]
        others = [each.other for each in results.differences if not each.paired]
        same = "On the same seeds and the same test tasks"
        same += f", except for {', '.join(others)}, whose test tasks are others" if others else ""
        parts += [escape(f"{same}. Clear: the 95% interval of the test accuracy excludes zero.")]
    return parts


def _costs(results: Results) -> list[str]:
    if not results.cost:
        return []
    parts = [
        "## Cost of one meta-gradient",
        "Of the tasks and the model that the variants share: first order, and second order by each engine, on all "
        f"tasks at once, measured in turns{_elsewhere(results)}. Peak memory, MiB:",
        table(*memory_rows(results)),
    ]
    steps, times = time_rows(results)
    return parts + (["Median time, ms:", table(steps, times)] if times else [])


def _elsewhere(results: Results) -> str:
    """The machine of the measurement, if the runs were made on another."""
    here = {name: str(value) for name, value in results.cost_machine.items()}
    if not here or all(str(results.machine.get(name)) == here[name] for name in ("cpu", "gpu") if name in here):
        return ""
    return escape(f", on another machine than the runs ({here.get('gpu', here.get('cpu'))})")


def _plots(names: Iterable[str]) -> list[str]:
    parts = []
    for name in names:
        caption = CAPTIONS[name]
        parts += [f"### {caption.title}", f"![{caption.title}]({PLOTS}/{name}.png)", escape(caption.text)]
    return ["## Plots", *parts] if parts else []


def _origin(results: Results, folder: Path) -> list[str]:
    machine = "\n".join(f"- {escape(str(name))}: {escape(str(value))}" for name, value in results.machine.items())
    parts = ["## How this was made", "The command:", preformatted(results.command)]
    parts += ["The machine:", machine] if machine else []
    parts += [details("The whole configuration", preformatted(results.config))]
    parts += ["## Curves and pictures of the runs", "All of them overlaid in TensorBoard:"]
    return [*parts, preformatted(f"tensorboard --logdir {shlex.quote(str(folder))}")]
