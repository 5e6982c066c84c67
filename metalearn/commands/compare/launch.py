"""Runs of a comparison as processes of their own: one that dies takes no other with it.

On this machine joblib keeps a number of them going; with one of Hydra's launchers (``hydra/launcher=submitit_slurm``)
every variant is a ``scripts/train.py --multirun`` over the seeds, and the launcher sends its jobs wherever it does.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from joblib import Parallel, delayed
from rich.progress import Progress

from metalearn.commands.compare.variants import TRAIN, Job, format_override
from metalearn.commands.processes import ProcessPool
from metalearn.training.experiment import resolve_device

log = logging.getLogger(__name__)

CONSOLE = "console.log"
"""What a run wrote to its terminal, in its folder."""

_VALIDATED = re.compile(r"(\d+)/\d+  validation accuracy (\S+)")
_ERROR = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b(?! ignored)", re.MULTILINE)
_HYDRAS_ADVICE = "Set the environment variable HYDRA_FULL_ERROR"
_LONGEST_REASON = 600


def runs_at_a_time(jobs: Sequence[Job], wanted: int | None) -> int:
    """As many as asked for; else one per core on a CPU, and one on a GPU, whose memory and time are measured."""
    if wanted is None:
        on_gpu = any(resolve_device(job.config.run.device).type == "cuda" for job in jobs)
        wanted = 1 if on_gpu else cores()
    return max(1, min(wanted, len(jobs)))


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def launch(jobs: Sequence[Job], *, at_a_time: int, progress: Progress) -> dict[Path, str]:
    """Train on this machine, some runs at a time.

    Returns:
        Why runs failed, by their folder.
    """
    threads = max(1, cores() // at_a_time)
    bar = progress.add_task("meta-training", total=sum(job.config.outer.iterations for job in jobs), note="")
    steps = dict.fromkeys([job.folder for job in jobs], 0)

    def show(job: Job, iteration: int, note: str) -> None:
        steps[job.folder] = iteration
        progress.update(bar, completed=sum(steps.values()), note=note)

    with ProcessPool() as children:

        def train(job: Job) -> str | None:
            def show_progress(piece: str) -> None:
                for iteration, accuracy in _VALIDATED.findall(piece):
                    show(job, int(iteration), f"{job.folder.name}: validation {accuracy}")

            command = [sys.executable, str(TRAIN), *job.overrides, *_place(job)]
            log.info("%s: started", job.folder.name)
            try:
                status, written = children.run(command, job.folder / CONSOLE, threads=threads, callback=show_progress)
                reason = failure_reason(status, written, job.folder)
            except OSError as error:  # a full disk, a folder that cannot be made
                reason = f"{type(error).__name__}: {error}"
            if children.closing:
                return reason
            log.info("%s: %s", job.folder.name, f"FAILED, {reason}" if reason else "finished")
            show(job, job.config.outer.iterations, "")
            return reason

        reasons = Parallel(n_jobs=at_a_time, backend="threading", batch_size=1)(delayed(train)(job) for job in jobs)
    return {job.folder: reason for job, reason in zip(jobs, reasons, strict=True) if reason}


def launch_with_hydra(jobs: Sequence[Job], launcher: Sequence[str], folder: Path) -> dict[Path, str]:
    """Train through one of Hydra's launchers, all variants at once; as ``launch``.

    Args:
        jobs: all runs, or those that are left.
        launcher: overrides that choose and set the launcher.
        folder: the comparison's.
    """
    by_variant: dict[str, list[Job]] = {}
    for job in jobs:
        by_variant.setdefault(job.variant, []).append(job)
    with ProcessPool() as children:

        def train(variant: str) -> tuple[int, str]:
            command = [sys.executable, str(TRAIN), "--multirun", *sweep(by_variant[variant], launcher, folder)]
            return children.run(command, folder / f"{variant}.log", threads=None, callback=lambda piece: None)

        names = list(by_variant)
        ended = Parallel(n_jobs=len(names), backend="threading")(delayed(train)(name) for name in names)
    reasons = {}
    for name, (status, written) in zip(names, ended, strict=True):
        for job in by_variant[name]:
            if reason := failure_reason(status, written, job.folder):
                reasons[job.folder] = f"{name}.log (and what the launcher keeps) says: {reason}"
    return reasons


def sweep(jobs: Sequence[Job], launcher: Sequence[str], folder: Path) -> list[str]:
    """Overrides of ``scripts/train.py --multirun`` that train one variant with several seeds."""
    seeds = ",".join(str(job.config.run.seed) for job in jobs)
    place = f"hydra.sweep.dir={format_override(str(folder.absolute()))}"
    name = f"hydra.sweep.subdir='{jobs[0].variant}-seed${{run.seed}}'"
    return [*jobs[0].overrides, f"run.seed={seeds}", "run.resume=auto", place, name, *launcher]


def _place(job: Job) -> list[str]:
    folder = format_override(str(job.folder.absolute()))
    return [f"run.seed={job.config.run.seed}", "run.resume=auto", f"hydra.run.dir={folder}"]


def failure_reason(status: int, written: str, folder: Path) -> str | None:
    """In words; ``None`` if the run is finished, whatever else happened."""
    if (folder / "metrics.json").exists():
        return None
    if status < 0:
        name = signal.Signals(-status).name
        memory = "; the system kills so when memory runs out" if name == "SIGKILL" else ""
        return f"ended by {name}{memory}"
    written = written.partition(_HYDRAS_ADVICE)[0]
    errors = list(_ERROR.finditer(written))
    if errors:
        return written[errors[-1].start() :].strip()[:_LONGEST_REASON]
    last = written.strip().splitlines()[-1:] or ["it wrote nothing"]
    return f"exit status {status}: {last[0]}"[:_LONGEST_REASON]
