"""Run or resume a comparison: train what is not finished, measure costs, and report everything."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from metalearn.commands.command_line import launcher_overrides
from metalearn.commands.compare.gather import METRICS, collect_results, differences, hardware_of, measure_engine_costs
from metalearn.commands.compare.launch import launch, launch_with_hydra, runs_at_a_time
from metalearn.commands.compare.report import print_results, write_results
from metalearn.commands.compare.results import Results
from metalearn.commands.compare.variants import (
    Job,
    Variant,
    jobs,
    parse_variants,
    replace_in,
    resolve_variant_data,
    to_train_config,
)
from metalearn.commands.output_folders import (
    RESULTS_FILE,
    RUN_FILES,
    comparison_key,
    read_record,
    running_twin,
)
from metalearn.commands.shell import invocation
from metalearn.config.commands_schema import CompareConfig
from metalearn.config.run_config import changed_keys, resolve_resume, to_yaml
from metalearn.config.schema import TrainConfig
from metalearn.core import serialization as files
from metalearn.core.errors import ConfigError, RunError
from metalearn.core.json_files import read_json, read_metrics
from metalearn.core.profiling.hardware import describe_hardware
from metalearn.core.quoting import quote_command
from metalearn.core.text import plural
from metalearn.training.experiment import resolve_device
from metalearn.training.run_folder import COMPARISON_FILE, check_no_run_in, folder_lock
from metalearn.training.runtime.signals import signals_as_exceptions
from metalearn.training.tracking.console import print_line, print_path, progress_bar

log = logging.getLogger(__name__)


def run_comparison(config: CompareConfig, folder: Path) -> bool:
    """Train the unfinished runs, measure costs, and report; return whether every run is finished.

    Raises:
        RunError: if the folder holds another comparison or another configuration's run, or another process is at work.
        ConfigError: if a variant's device is not there.
    """
    shared = Variant("shared", [], to_train_config(config))
    shared, *variants = resolve_variant_data([shared, *parse_variants(config)])
    for variant in variants:
        try:
            resolve_device(variant.config.run.device)
        except ConfigError as error:
            raise ConfigError(f"compare.variants, {' '.join(variant.overrides)!r}: {error}") from error
    every = jobs(variants, config.compare.seeds, folder)
    with folder_lock(folder, wait=False), signals_as_exceptions():
        open_comparison(config, every, folder)
        print_path("Comparison folder", folder)
        try:
            reasons = train_missing(every, config.compare.jobs, folder)
            results = collect(config, shared.config, variants, every, reasons, folder)
        except (KeyboardInterrupt, SystemExit):
            finished = sum(_is_finished(job) for job in every)
            print_line(
                f"Stopped; {finished} of {plural(len(every), 'run is', 'runs are')} finished. "
                "The same command resumes here."
            )
            raise
        write_results(results, every, folder)
        print_results(results, folder)
    return results.complete


def _is_finished(job: Job) -> bool:
    return read_metrics(job.folder, required=METRICS) is not None


def open_comparison(config: CompareConfig, every: Sequence[Job], folder: Path) -> None:
    """Record the configuration in a locked folder, after checking that the folder is new or this comparison's.

    Later commands may ask for more seeds, other variants or another target; finished runs stay.

    Raises:
        RunError: if it holds a comparison or a run with another configuration of the training.
        RunExistsError: if it is the folder of another command's run.
    """
    path = folder / COMPARISON_FILE
    if path.exists():
        changes = changed_keys(comparison_key(asdict(config)), comparison_key(read_record(folder)))
        if conflicts := [line for name, line in changes.items() if not name.startswith("compare.")]:
            listed = "\n".join(conflicts)
            raise RunError(
                f"{folder} holds another comparison:\n{listed}\nUse another folder, or the same values; only compare.* "
                "may change (more seeds, other variants)."
            )
    else:
        check_no_run_in(folder, RUN_FILES)
    for job in every:
        resolve_resume(replace_in(job.config, "run", resume="auto"), job.folder)
    if path.exists():
        log.info("Resuming the comparison in %s", folder)
        requested = {job.folder.name for job in every}
        others = sorted(p.parent.name for p in folder.glob("*/config.yaml") if p.parent.name not in requested)
        if others:
            log.warning("Not requested now, and left out of the report: %s", ", ".join(others))
    elif twin := running_twin(folder, asdict(config)):
        log.warning("The same comparison is in progress in %s; this is another, in %s", twin, folder)
    files.atomic_write_text(path, to_yaml(config))


def train_missing(every: Sequence[Job], at_a_time: int | None, folder: Path) -> dict[Path, str]:
    """Train the runs that are not finished; return why some failed, by their folder."""
    left = [job for job in every if not _is_finished(job)]
    if done := len(every) - len(left):
        log.info("%d of %s finished already", done, plural(len(every), "run is", "runs are"))
    if not left:
        return {}
    mark_incomplete(folder)
    if launcher := launcher_overrides():
        log.info("%s through %s", plural(len(left), "run"), launcher[0])
        return launch_with_hydra(left, launcher, folder)
    number = runs_at_a_time(left, at_a_time)
    starting = "each takes a while to start before its first meta-step"
    log.info("%s, %d at a time; %s", plural(len(left), "run"), number, starting)
    with progress_bar() as progress:
        return launch(left, at_a_time=number, progress=progress)


def mark_incomplete(folder: Path) -> None:
    """Mark the results of an earlier command, which stay in place, as incomplete."""
    path = folder / RESULTS_FILE
    try:
        content = read_json(path, "results", "It will be written again.")
    except FileNotFoundError:
        return
    except RunError as error:
        log.warning("%s", error)
        content = {}
    files.atomic_write_json(path, {**content, "complete": False})


def collect(
    config: CompareConfig,
    shared: TrainConfig,
    variants: list[Variant],
    every: list[Job],
    reasons: Mapping[Path, str],
    folder: Path,
) -> Results:
    """Return all results, with the cost of a meta-gradient; that is measured only once in a folder."""
    found, target = collect_results(variants, every, reasons, config.compare.target_accuracy)
    at_a_time = 1 if launcher_overrides() else runs_at_a_time(every, config.compare.jobs)
    metrics = [run.metrics for variant in found for run in variant.finished]
    trained_s = sum(run["time.total_s"] for run in metrics) / at_a_time
    with progress_bar() as progress:
        costs, left_out = measure_engine_costs(shared, config.compare, folder, progress, budget_s=trained_s)
    here = describe_hardware(resolve_device(shared.run.device))
    memory_kinds = dict.fromkeys(m["memory.kind"] for m in metrics) or ["cuda" if "gpu" in here else "cpu-tensors"]
    return Results(
        title=f"{shared.data.label}, {shared.task.ways}-way {shared.task.shots}-shot",
        dataset=shared.data.label,
        command=quote_command([*invocation("compare"), *sys.argv[1:]]),
        config=to_yaml(config),
        machine=dict(hardware_of(metrics) or here),
        memory_kind=" / ".join(memory_kinds),
        iterations=shared.outer.iterations,
        seeds=list(config.compare.seeds),
        target_accuracy=target,
        inner_steps=shared.inner.steps,
        variants=found,
        differences=differences(variants, found, folder),
        cost=costs,
        cost_limit_mib=config.compare.memory_limit_mib,
        cost_machine=dict(here),
        cost_left_out=left_out,
        runs_at_a_time=at_a_time,
    )
