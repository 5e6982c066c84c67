"""Folders: another configuration in them, several runs at once, an event file that was cut, no room, no permission."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from pathlib import Path

from metalearn.core import serialization as files
from metalearn.training.tracking.event_files import EVENT_FILES
from tests.faults.processes import finished, output, start, state_of, wait_for_state
from tests.faults.runs import RUN, SMALL, STEPS, assert_curves, assert_same, resume, whole
from tests.faults.suite import Row

CHANGED = (
    ["inner.lr=0.2"],
    ["task.shots=2", "outer.lr=0.1"],
    ["model.hidden=[9]"],
    ["run.seed=1", "inner.second_order=false"],
    ["data.jitter=0.1"],
    ["outer.iterations=30", "eval.every=5"],
)


def change_the_configuration(i: int, folder: Path, shared: Path) -> None:
    """Every key that differs is listed, with both values, and how to start another run from this one."""
    _stopped(folder)
    before = state_of(folder / RUN)
    changed = CHANGED[i]
    assert finished(start([*SMALL, f"hydra.run.dir={RUN}", "run.resume=true", *changed], folder)) == 2
    for key in [o.partition("=")[0] for o in changed]:
        assert f"\n{key}: " in output(folder)
        assert " in the folder, " in output(folder)
    assert "run.init_from=" in output(folder)
    assert state_of(folder / RUN)["total_s"] == before["total_s"], "nothing was trained"
    assert_same(resume(folder), whole(shared))


def _stopped(folder: Path) -> None:
    """A run that was killed somewhere after its eighth meta-step."""
    process = start([*SMALL, f"hydra.run.dir={RUN}"], folder)
    wait_for_state(folder / RUN, 8, process)
    process.kill()
    finished(process)


def wait_until(moment: float) -> None:
    """So that several processes begin together."""
    time.sleep(max(0.0, moment - time.time()))


def start_together(i: int, folder: Path, shared: Path) -> None:
    """Ten runs with the same command, in one second."""
    small = [o for o in SMALL if not o.startswith(("outer.iterations", "eval.every"))]
    moment = time.time() + 1.5
    arguments = [*small, "outer.iterations=1", "eval.every=1", "hydra.run.dir=../outputs/${run_name:}"]
    processes = [start(arguments, folder / str(n), before=wait_until, given=(moment,)) for n in range(10)]
    for n, process in enumerate(processes):
        assert finished(process) == 0, output(folder / str(n))
    runs = list((folder / "outputs").glob("*/*/metrics.json"))
    assert len(runs) == 10, f"{len(runs)} folders"


def cut_the_event_file(i: int, folder: Path, shared: Path) -> None:
    """At 20, 55 and 90% of its length; the training loses nothing, and says what its curves have lost."""
    _stopped(folder)
    (events,) = (folder / RUN).glob(EVENT_FILES)
    size = state_of(folder / RUN)["event_files"][events.name] * (20, 55, 90)[i] // 100
    os.truncate(events, size)
    run_dir = resume(folder)
    assert_curves(run_dir)
    assert "its curves lack points that were shown before" in " ".join(output(folder).split())
    ours, theirs = state_of(run_dir)["state"], state_of(whole(shared))["state"]
    assert ours["iteration"] == theirs["iteration"]


def fail_writing(number: int, call: int) -> None:
    """Have a later ``os.fsync`` fail as it does where a disk is full, read-only or gone."""
    calls = 0
    real = os.fsync

    def fsync(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls >= call:
            raise OSError(number, os.strerror(number))
        real(handle)

    files.os.fsync = fsync  # type: ignore[attr-defined]


def write_in_vain(i: int, folder: Path, shared: Path) -> None:
    """A full disk (a real one, where one can be mounted), a full quota, a disk that turns read-only, one that is."""
    if i == 3:
        assert finished(start([*SMALL, "hydra.run.dir=/proc/run"], folder)) == 2
        assert "hydra.run.dir=/proc/run" in output(folder)
        assert "Traceback" not in output(folder)
        return
    number = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)[i]
    disk = folder / RUN
    disk.mkdir()
    mounted = i == 0 and _mount(disk)
    try:
        if mounted:
            (disk / "ballast").write_bytes(bytes(280_000))
            process = start([*SMALL, f"hydra.run.dir={RUN}"], folder)
        else:
            process = start([*SMALL, f"hydra.run.dir={RUN}"], folder, before=fail_writing, given=(number, 80))
        assert finished(process) == 2, output(folder)
        said = output(folder)
        assert os.strerror(number) in said, said
        assert ("run.resume=true" if i < 2 else "hydra.run.dir=PATH") in said, said
        assert "Traceback" not in said, said
        kept = state_of(disk)["state"]["iteration"]
        assert 0 < kept < STEPS
        if mounted:
            (disk / "ballast").unlink()
        assert_same(resume(folder), whole(shared))
    finally:
        if mounted:
            subprocess.run(["umount", str(disk)], check=True)


def _mount(disk: Path) -> bool:
    """A disk of half a megabyte, where the tests may mount one."""
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


DISKS = Row(
    "disk",
    "disk full, read-only folder",
    "old checkpoint intact, clear error",
    tries=4,
    attempt=write_in_vain,
    short=(1, 3),
    seconds=3,
)
OTHER_CONFIG = Row(
    "changed_config",
    "resume under a changed config",
    "differing keys listed, refused",
    tries=6,
    attempt=change_the_configuration,
    short=(5,),
    seconds=6,
)
TOGETHER = Row(
    "together",
    "runs started together in one second",
    "ten folders",
    tries=1,
    attempt=start_together,
    short=(0,),
    cases=10,
    seconds=10,
)
EVENT_FILE = Row(
    "event_file",
    "event file cut, then resumed",
    "monotone steps, none doubled",
    tries=3,
    attempt=cut_the_event_file,
    short=(1,),
    seconds=4,
)
