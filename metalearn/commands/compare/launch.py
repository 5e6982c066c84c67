"""Train the runs of a comparison in child processes: if one crashes, the others continue.

On this machine joblib keeps a number of them running. With one of Hydra's launchers (``hydra/launcher=submitit_slurm``)
every variant is a ``scripts/train.py --multirun`` over the seeds, and the launcher submits its jobs.
"""

from __future__ import annotations

import logging
import re
import signal
from collections.abc import Sequence
from pathlib import Path

from joblib import Parallel, delayed
from rich.progress import Progress

from metalearn.commands.compare.variants import Job
from metalearn.commands.processes import METALEARN, ProcessPool
from metalearn.core.errors import RunError
from metalearn.core.json_files import read_metrics
from metalearn.core.profiling.hardware import num_cores
from metalearn.core.quoting import format_override
from metalearn.training.evaluate_run import format_test
from metalearn.training.experiment import resolve_device

log = logging.getLogger(__name__)

TRAIN = (*METALEARN, "train")
"""The command that trains one run, without its overrides."""

CONSOLE = "console.log"
"""The file in a run's folder that holds its terminal output."""

_PROGRESS = re.compile(r"^(?:meta-training )? *(\d+)/\d+(?:  validation accuracy (\S+))?", re.MULTILINE)
_ERROR = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b(?! ignored)", re.MULTILINE)
_HYDRA_HINT = "Set the environment variable HYDRA_FULL_ERROR"
_MAX_REASON_LENGTH = 600


def runs_at_a_time(jobs: Sequence[Job], requested: int | None) -> int:
    """Return the number requested; by default one per core, but one on a GPU, whose memory and time are measured."""
    if requested is None:
        on_gpu = any(resolve_device(job.config.run.device).type == "cuda" for job in jobs)
        requested = 1 if on_gpu else num_cores()
    return max(1, min(requested, len(jobs)))


def launch(jobs: Sequence[Job], *, at_a_time: int, progress: Progress) -> dict[Path, str]:
    """Train on this machine, some runs at a time; return why runs failed, by their folder."""
    threads = max(1, num_cores() // at_a_time)
    bar = progress.add_task("meta-training", total=sum(job.config.outer.iterations for job in jobs), note="")
    steps = dict.fromkeys([job.folder for job in jobs], 0)
    notes = dict.fromkeys(steps, "training")

    def update_bar(job: Job, iteration: int, note: str) -> None:
        steps[job.folder] = iteration
        progress.update(bar, completed=sum(steps.values()), note=note)

    with ProcessPool() as pool:

        def train(job: Job) -> str | None:
            def show_progress(output: str) -> None:
                progress.update(bar)
                for iteration, accuracy in _PROGRESS.findall(output):
                    notes[job.folder] = f"validation {accuracy}" if accuracy else notes[job.folder]
                    update_bar(job, int(iteration), f"{job.folder.name}: {notes[job.folder]}")

            folder = format_override(str(job.folder.absolute()))
            command = [*job.overrides, f"run.seed={job.config.run.seed}", "run.resume=auto", f"hydra.run.dir={folder}"]
            log.info("%s: started", job.folder.name)
            update_bar(job, 0, f"{job.folder.name}: starting")
            try:
                status, output = pool.run(
                    [*TRAIN, *command], job.folder / CONSOLE, threads=threads, callback=show_progress
                )
                reason = failure_reason(status, output, job.folder)
            except OSError as error:  # a full disk, a folder that cannot be created
                reason = f"{type(error).__name__}: {error}"
            if pool.closing:
                return reason
            log.info("%s: %s", job.folder.name, f"FAILED, {reason}" if reason else describe_finished(job.folder))
            update_bar(job, job.config.outer.iterations, "")
            return reason

        reasons = Parallel(n_jobs=at_a_time, backend="threading", batch_size=1)(delayed(train)(job) for job in jobs)
    return {job.folder: reason for job, reason in zip(jobs, reasons, strict=True) if reason}


def launch_with_hydra(jobs: Sequence[Job], launcher: Sequence[str], folder: Path) -> dict[Path, str]:
    """Train all variants at once by one of Hydra's launchers; return why runs failed, by their folder."""
    by_variant: dict[str, list[Job]] = {}
    for job in jobs:
        by_variant.setdefault(job.variant, []).append(job)
    with ProcessPool() as pool:

        def train(variant: str) -> tuple[int, str]:
            command = [*TRAIN, "--multirun", *sweep(by_variant[variant], launcher, folder)]
            return pool.run(command, folder / f"{variant}.log", threads=None, callback=lambda output: None)

        names = list(by_variant)
        ended = Parallel(n_jobs=len(names), backend="threading")(delayed(train)(name) for name in names)
    reasons = {}
    for name, (status, output) in zip(names, ended, strict=True):
        for job in by_variant[name]:
            if reason := failure_reason(status, output, job.folder):
                reasons[job.folder] = f"{name}.log (and the logs of the launcher) says: {reason}"
    return reasons


def sweep(jobs: Sequence[Job], launcher: Sequence[str], folder: Path) -> list[str]:
    """Return the overrides of ``--multirun`` that train one variant with several seeds."""
    seeds = ",".join(str(job.config.run.seed) for job in jobs)
    parent = f"hydra.sweep.dir={format_override(str(folder.absolute()))}"
    name = f"hydra.sweep.subdir='{jobs[0].variant}-seed${{run.seed}}'"
    return [*jobs[0].overrides, f"run.seed={seeds}", "run.resume=auto", parent, name, *launcher]


def describe_finished(folder: Path) -> str:
    """Return that a run is finished, with its test score."""
    return f"finished, test {format_test(read_metrics(folder) or {})}"


def failure_reason(status: int, output: str, folder: Path) -> str | None:
    """Return why a run failed: its last error; ``None`` if it has written its metrics."""
    try:
        if read_metrics(folder) is not None:
            return None
    except RunError as error:
        return str(error)
    if status < 0:
        name = signal.Signals(-status).name
        hint = "; the system does this when memory runs out" if name == "SIGKILL" else ""
        return f"ended by {name}{hint}"
    output = output.partition(_HYDRA_HINT)[0]
    if errors := list(_ERROR.finditer(output)):
        return output[errors[-1].start() :].strip()[:_MAX_REASON_LENGTH]
    last = output.strip().splitlines()[-1:] or ["it wrote nothing"]
    return f"exit status {status}: {last[0]}"[:_MAX_REASON_LENGTH]
