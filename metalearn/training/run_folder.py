"""The lock of a run's folder, which belongs to one process at a time. Imports no torch."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from metalearn.core.errors import RunError, RunExistsError

log = logging.getLogger(__name__)

TRAINING_FILES = ("config.yaml", "metrics.json", "checkpoints")
"""A folder with one of these holds a training."""

COMPARISON_FILE = "comparison.yaml"
"""The file that makes a folder a comparison's: its configuration."""

_SWEEP_FILE = "multirun.yaml"  # Hydra's

LOCK = ".lock"
"""The file that is locked while a process works in the folder; the system releases it when that dies."""


def is_part_of_more(run_dir: Path) -> bool:
    """Return whether a run is one of a comparison's or of a sweep's."""
    run_dir = run_dir.absolute()
    return (run_dir.parent / COMPARISON_FILE).exists() or any((p / _SWEEP_FILE).exists() for p in run_dir.parents[:2])


def check_no_run_in(folder: Path, files: Iterable[str]) -> None:
    """Check that a folder holds none of these files.

    Raises:
        RunExistsError: naming the file.
    """
    for file in files:
        if (folder / file).exists():
            raise RunExistsError(folder, file, can_resume=file in TRAINING_FILES)


def check_is_no_link(path: Path) -> None:
    """Check that a file to which lines are appended is no link, so that they are not written to somewhere else.

    Files that are written at once need no check: a new one takes the place of the link.

    Raises:
        RunError: naming the link and where it points.
    """
    if path.is_symlink():
        raise RunError(f"{path} is a link to {path.readlink()}, which would be written to. Remove it and run again.")


def check_holds_files(folder: Path) -> None:
    """Check that a folder holds nothing that reading would wait for, as a named pipe.

    Raises:
        RunError: naming it.
    """
    for path in folder.glob("*"):
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise RunError(f"{path} is a pipe, a socket or a device, and no file. Remove it and run again.")


@contextmanager
def folder_lock(folder: Path, *, wait: bool) -> Iterator[None]:
    """Make this process the only one that works in a folder.

    Args:
        folder: made if it is missing.
        wait: for another process to end, or give up at once.

    Raises:
        RunError: if another process is at work there and ``wait`` is false.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        if not wait:
            raise RunError(f"{folder}: another process is at work in this folder. Wait for it or stop it.") from None
        log.info("Another process is at work in %s: waiting for it to end (Ctrl-C gives up)", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def is_locked(folder: Path) -> bool:
    """Return whether a process works in a folder at this moment."""
    if not (folder / LOCK).exists():
        return False
    try:
        with FileLock(folder / LOCK, blocking=False):
            return False
    except Timeout:
        return True
