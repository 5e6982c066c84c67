"""A whole comparison: runs that are missing are trained, costs measured, and everything reported.

What is finished is kept, so that the same command goes on where an interrupted one stopped.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from metalearn.commands.cli import check_output_dir
from metalearn.commands.compare.engine_cost import measure_engine_costs
from metalearn.commands.compare.gather import collect_results, differences
from metalearn.commands.compare.launch import launch, launch_with_hydra, runs_at_a_time
from metalearn.commands.compare.results import Results, VariantResult
from metalearn.commands.compare.show import print_results, write_results
from metalearn.commands.compare.variants import Job, Variant, base_variant, jobs, parse_variants, resolve_variant_data
from metalearn.config.commands_schema import CompareConfig
from metalearn.config.output_names import COMPARISON_FILE, RESULTS_FILE, comparison_key, read_record, running_twin
from metalearn.config.overrides import launcher_overrides
from metalearn.config.run_config import changed_keys, resolve_resume, to_yaml
from metalearn.config.run_folder import folder_lock
from metalearn.core import serialization as files
from metalearn.core.errors import ConfigError, RunError
from metalearn.core.profiling.hardware import describe_hardware
from metalearn.training.experiment import resolve_device
from metalearn.training.runtime.signals import SIGHUP, sigterm_as_exception
from metalearn.training.tracking.console import print_line, print_path, progress_bar

log = logging.getLogger(__name__)


def run_comparison(config: CompareConfig, folder: Path) -> bool:
    """Train what is left to train, measure, and report.

    Args:
        config: checked.
        folder: the comparison's own; it may hold a part of it.

    Returns:
        Whether every run is finished.

    Raises:
        RunError: if the folder holds another comparison or another configuration's run, or another process is at work.
        ConfigError: if a variant's device is not there.
    """
    base, *variants = resolve_variant_data([base_variant(config), *parse_variants(config)])
    check_devices(variants)
    every = jobs(variants, config.compare.seeds, folder)
    with folder_lock(folder, wait=False), sigterm_as_exception(*SIGHUP):
        claim(config, every, folder)
        print_path("Comparison folder", folder)
        try:
            reasons = train_missing(every, config.compare.jobs, folder)
            results = collect(config, base, variants, every, reasons, folder)
        except (KeyboardInterrupt, SystemExit):
            finished = sum((job.folder / "metrics.json").exists() for job in every)
            print_line(f"Stopped; {finished} of {len(every)} runs are finished. The same command goes on from here.")
            raise
        write_results(results, every, folder)
        print_results(results, folder)
    return results.complete


def check_devices(variants: Sequence[Variant]) -> None:
    """Refuse a device that is not there, before anything is written."""
    for variant in variants:
        try:
            resolve_device(variant.config.run.device)
        except ConfigError as error:
            raise ConfigError(f"compare.variants, {' '.join(variant.overrides)!r}: {error}") from error


def claim(config: CompareConfig, every: Sequence[Job], folder: Path) -> None:
    """Make a locked folder this comparison's, or find that it is.

    More seeds, other variants or another target may be asked of a comparison later: what is finished stays.

    Raises:
        RunError: if it was begun with another configuration of the training, or holds a run with another one.
        FolderTakenError: if it is a run's.
    """
    path = folder / COMPARISON_FILE
    if path.exists():
        refuse_another(config, folder)
    else:
        check_output_dir(folder)
    for job in every:
        resumed = dataclasses.replace(job.config.run, resume="auto")
        resolve_resume(dataclasses.replace(job.config, run=resumed), job.folder)
    if path.exists():
        log.info("Going on with the comparison in %s", folder)
        asked = {job.folder.name for job in every}
        others = sorted(p.parent.name for p in folder.glob("*/config.yaml") if p.parent.name not in asked)
        if others:
            log.warning("Not asked for now, and left out of the report: %s", ", ".join(others))
    elif twin := running_twin(folder, asdict(config)):
        log.warning("The same comparison is in progress in %s; this is another, in %s", twin, folder)
    files.atomic_write_text(path, to_yaml(config))


def refuse_another(config: CompareConfig, folder: Path) -> None:
    """Refuse a folder whose comparison trains otherwise; what is compared may change."""
    every = changed_keys(comparison_key(asdict(config)), comparison_key(read_record(folder)))
    if differing := [line for name, line in every.items() if not name.startswith("compare.")]:
        listed = "\n".join(differing)
        raise RunError(
            f"{folder} holds another comparison:\n{listed}\nTake another folder, or the same values; only compare.* "
            "may change (more seeds, other variants)."
        )


def train_missing(every: Sequence[Job], at_a_time: int | None, folder: Path) -> dict[Path, str]:
    """Train the runs that are not finished; why some failed, by their folder."""
    left = [job for job in every if not (job.folder / "metrics.json").exists()]
    if done := len(every) - len(left):
        log.info("%d of %d runs are finished already", done, len(every))
    if not left:
        return {}
    mark_incomplete(folder)
    if launcher := launcher_overrides():
        log.info("%d runs through %s", len(left), launcher[0])
        return launch_with_hydra(left, launcher, folder)
    number = runs_at_a_time(left, at_a_time)
    log.info("%d runs, %d at a time", len(left), number)
    with progress_bar() as progress:
        return launch(left, at_a_time=number, progress=progress)


def mark_incomplete(folder: Path) -> None:
    """Earlier results stay, but are no longer those of the whole comparison."""
    path = folder / RESULTS_FILE
    if path.exists():
        content = json.loads(path.read_text())
        files.atomic_write_text(path, json.dumps({**content, "complete": False}, indent=2) + "\n")


def collect(
    config: CompareConfig,
    base: Variant,
    variants: list[Variant],
    every: list[Job],
    reasons: Mapping[Path, str],
    folder: Path,
) -> Results:
    """All figures, with the cost of one meta-gradient measured now unless it was before."""
    found, target = collect_results(variants, every, reasons, config.compare.target_accuracy)
    with progress_bar() as progress:
        rows = measure_engine_costs(base.config, config.compare, folder, progress)
    task = base.config.task
    here = describe_hardware(resolve_device(base.config.run.device))
    where, kind = hardware_of(found) or (here, "cuda" if "gpu" in here else "cpu-tensors")
    return Results(
        title=f"{base.config.data.name}, {task.ways}-way {task.shots}-shot",
        dataset=base.config.data.name,
        command=shlex.join(["python", *sys.argv]),
        config=to_yaml(config),
        machine=where,
        memory_kind=kind,
        iterations=base.config.outer.iterations,
        seeds=list(config.compare.seeds),
        target_accuracy=target,
        inner_steps=base.config.inner.steps,
        variants=found,
        differences=differences(variants, found, folder),
        cost=rows,
        cost_limit_mib=config.compare.memory_limit_mib,
        cost_machine=dict(here),
        runs_at_a_time=1 if launcher_overrides() else runs_at_a_time(every, config.compare.jobs),
    )


def hardware_of(variants: Sequence[VariantResult]) -> tuple[dict[str, object], str] | None:
    """The machine of the runs, and how their memory was counted; every value, where they differ."""
    metrics = [run.metrics for variant in variants for run in variant.finished]
    if not metrics:
        return None
    names = [name for name in metrics[0] if name.startswith("machine.")]
    values = {name: list(dict.fromkeys(str(m.get(name)) for m in metrics)) for name in names}
    where: dict[str, object] = {name.removeprefix("machine."): " / ".join(found) for name, found in values.items()}
    return where, " / ".join(dict.fromkeys(str(m["memory.kind"]) for m in metrics))
