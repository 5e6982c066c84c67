"""Disks that are full or read-only, and runs that are started in one second and must not share a folder."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from metalearn.core import serialization as files
from tests.faults.cases import cases
from tests.faults.processes import load_state, read_output, start_training, wait_for_exit
from tests.faults.runs import RUN, SMALL, SMALL_RUN, STEPS, assert_runs_equal, resume


def wait_until(moment: float) -> None:
    """Sleep until then, so that several processes begin together."""
    time.sleep(max(0.0, moment - time.time()))


@pytest.mark.fault("runs started together in one second", "ten folders", cases=10)
def test_runs_started_together(tmp_path: Path) -> None:
    small = [o for o in SMALL if not o.startswith(("outer.iterations", "eval.every"))]
    moment = time.time() + 1.5
    arguments = [*small, "outer.iterations=1", "eval.every=1", "hydra.run.dir=../outputs/${run_name:}"]
    processes = [start_training(arguments, tmp_path / str(n), before=wait_until, args=(moment,)) for n in range(10)]
    for n, process in enumerate(processes):
        assert wait_for_exit(process) == 0, read_output(tmp_path / str(n))
    assert len(list((tmp_path / "outputs").glob("*/*/metrics.json"))) == 10


def fail_writing(number: int, call: int) -> None:
    """Make ``os.fsync`` fail from a call on, as it does where a disk is full, read-only or gone."""
    calls = 0
    real = os.fsync

    def fsync(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls >= call:
            raise OSError(number, os.strerror(number))
        real(handle)

    files.os.fsync = fsync  # type: ignore[attr-defined]


@contextmanager
def nearly_full_disk(folder: Path) -> Iterator[bool]:
    """Mount a disk of half a megabyte and fill most of it; yield whether the tests may mount one at all."""
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        if mounted:
            (folder / "ballast").write_bytes(bytes(280_000))
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.fault("disk full, read-only folder", "old checkpoint intact, clear error")
@pytest.mark.parametrize("number", cases([errno.ENOSPC, errno.EDQUOT, errno.EROFS, None], quick=[1, 3]))
def test_write_error(number: int | None, tmp_path: Path, uninterrupted_run: Path) -> None:
    if number is None:  # nothing can be written from the start
        assert wait_for_exit(start_training([*SMALL, "hydra.run.dir=/proc/run"], tmp_path)) == 2
        assert "hydra.run.dir=/proc/run" in read_output(tmp_path)
        assert "Traceback" not in read_output(tmp_path)
        return
    run_dir = tmp_path / RUN
    run_dir.mkdir()
    with nearly_full_disk(run_dir) if number == errno.ENOSPC else nullcontext(False) as mounted:
        process = start_training(SMALL_RUN, tmp_path, before=None if mounted else fail_writing, args=(number, 80))
        assert wait_for_exit(process) == 2, read_output(tmp_path)
        said = read_output(tmp_path)
        assert os.strerror(number) in said, said
        assert ("hydra.run.dir=PATH" if number == errno.EROFS else "run.resume=true") in said, said
        assert "Traceback" not in said, said
        assert 0 < load_state(run_dir)["state"]["iteration"] < STEPS
        if mounted:
            (run_dir / "ballast").unlink()
        assert_runs_equal(resume(tmp_path), uninterrupted_run)
