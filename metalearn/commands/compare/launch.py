"""Runs of a comparison as processes of their own: one that dies takes no other with it.

On this machine joblib keeps a number of them going; with one of Hydra's launchers (``hydra/launcher=submitit_slurm``)
every variant is a ``scripts/train.py --multirun`` over the seeds, and the launcher sends its jobs wherever it does.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from joblib import Parallel, delayed
from rich.progress import Progress

from metalearn.commands.compare.variants import TRAIN, Job, format_override
from metalearn.training.experiment import resolve_device

log = logging.getLogger(__name__)

CONSOLE = "console.log"
"""What a run wrote to its terminal, in its folder."""

_POLL_S = 0.5
_GRACE_S = 20.0  # for a child to end after SIGTERM
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


@dataclass
class ProcessPool:
    """Processes that were started and not waited for; a context manager that leaves none behind."""

    running: set[subprocess.Popen[bytes]] = field(default_factory=set)
    closing: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> ProcessPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.lock:
            self.closing = True  # a thread that waits for its turn starts no more
            left = list(self.running)
        for child in left:
            child.terminate()
        try:
            end = time.monotonic() + _GRACE_S
            for child in left:
                child.wait(max(0.0, end - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):  # deaf, or the user is in a hurry
            for child in left:
                child.kill()
                child.wait()

    def run(
        self, command: Sequence[str], console: Path, *, threads: int | None, watch: Callable[[str], None]
    ) -> tuple[int, str]:
        """Run a command to its end; its output is appended to a file, and shown to ``watch`` piece by piece.

        Returns:
            Its exit status, and what it wrote.
        """
        console.parent.mkdir(parents=True, exist_ok=True)
        limit = {"OMP_NUM_THREADS": str(threads)} if threads else {}
        environment = {**limit, **os.environ, "COLUMNS": "160", "PYTHONUNBUFFERED": "1"}
        written = ""
        with console.open("ab") as sink, console.open("r", errors="replace") as source:
            source.seek(0, os.SEEK_END)
            with self.lock:
                if self.closing:
                    raise ChildProcessError("the comparison is being stopped")
                # In a session of its own, so that Ctrl-C reaches it once, through ``__exit__``: a second signal would
                # end it before it has put its state away.
                child = subprocess.Popen(
                    command, stdout=sink, stderr=subprocess.STDOUT, env=environment, start_new_session=True
                )
                self.running.add(child)
            while True:
                ended = _ended(child)
                if piece := source.read():
                    written += piece
                    watch(piece)
                if ended:
                    break
            self.running.discard(child)
        return child.returncode, written


def _ended(child: subprocess.Popen[bytes]) -> bool:
    try:
        child.wait(_POLL_S)
    except subprocess.TimeoutExpired:
        return False
    return True


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
            def watch(piece: str) -> None:
                for iteration, accuracy in _VALIDATED.findall(piece):
                    show(job, int(iteration), f"{job.folder.name}: validation {accuracy}")

            command = [*TRAIN, *job.overrides, *_place(job)]
            log.info("%s: started", job.folder.name)
            try:
                status, written = children.run(command, job.folder / CONSOLE, threads=threads, watch=watch)
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
            command = [*TRAIN, "--multirun", *sweep(by_variant[variant], launcher, folder)]
            return children.run(command, folder / f"{variant}.log", threads=None, watch=lambda piece: None)

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
