"""A training that is killed, stopped, or cannot write resumes to the same bits; runs never share a folder."""

from __future__ import annotations

import errno
import io
import locale
import logging
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from metalearn.core import serialization as files
from tests.faults.cases import cases
from tests.faults.processes import load_state, read_output, start_training, wait_for_checkpoint, wait_for_exit
from tests.faults.runs import RUN, SMALL, SMALL_RUN, STEPS, assert_runs_equal, resume, train_and_kill


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


CALLS_PER_SAVE = 9  # of os.fsync and os.replace: three files, each synced, renamed, and its folder synced


@pytest.mark.fault(
    "kill -9 at a random step, resume",
    "final parameters, optimiser, random states, metrics and curves bitwise equal to the uninterrupted run",
)
@pytest.mark.parametrize("seed", cases(range(20), quick=[0]))
def test_kill_at_random_step(seed: int, tmp_path: Path, uninterrupted_run: Path) -> None:
    train_and_kill(tmp_path, after=random.Random(seed).randrange(1, STEPS))
    assert_runs_equal(resume(tmp_path), uninterrupted_run)


def die_while_saving(call: int, share: float) -> None:
    """Kill this process at a call of ``os.fsync`` or ``os.replace``, with a share of the data on disk."""
    calls = 0

    def count(name: str) -> None:
        real = getattr(os, name)

        def call_or_die(*args: object) -> object:
            nonlocal calls
            calls += 1
            if calls == call:
                if name == "fsync" and not os.path.isdir(f"/proc/self/fd/{args[0]}"):
                    os.ftruncate(args[0], int(share * os.fstat(args[0]).st_size))  # type: ignore[arg-type]
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)

        setattr(files.os, name, call_or_die)  # type: ignore[attr-defined]

    count("fsync")
    count("replace")


@pytest.mark.fault(
    "kill -9 during a save", "no unreadable checkpoint is ever picked up; at most one save interval lost"
)
@pytest.mark.parametrize("seed", cases(range(50), quick=[4]))
def test_kill_during_save(seed: int, tmp_path: Path, uninterrupted_run: Path) -> None:
    draw = random.Random(seed)
    saves = draw.randrange(1, STEPS - 1)
    call = 3 + CALLS_PER_SAVE * saves + seed % CALLS_PER_SAVE  # the first three write config.yaml
    process = start_training(SMALL_RUN, tmp_path, before=die_while_saving, args=(call, draw.random()))
    assert wait_for_exit(process) == -signal.SIGKILL, read_output(tmp_path)
    at = load_state(tmp_path / RUN)["state"]["iteration"]
    newest = max(int(p.name.split("-")[1][:8]) for p in (tmp_path / RUN / "checkpoints").glob("*state-*"))
    assert newest - at <= 1, f"the state after {newest} was being saved, and {at} is what is left"
    run_dir = resume(tmp_path)
    assert "damaged" not in read_output(tmp_path), "the state that is picked up is intact"
    assert not list((run_dir / "checkpoints").glob(".*")), "no partly written file is left"
    assert_runs_equal(run_dir, uninterrupted_run)


STOPS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU]


@pytest.mark.fault("SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGUSR2, SIGXCPU", "saved, right exit code, resumes bitwise")
@pytest.mark.parametrize("number", cases(STOPS * 4, quick=[0, 1, 2, 5]))
def test_stop_by_signal(number: signal.Signals, tmp_path: Path, uninterrupted_run: Path) -> None:
    process = start_training([*SMALL_RUN, "run.checkpoint_every_s=null"], tmp_path)
    wait_for_checkpoint(
        tmp_path / RUN, 8, process
    )  # saved by the first validation; nothing else saves without a request
    os.kill(process.pid or 0, number)
    assert wait_for_exit(process) == 128 + number, read_output(tmp_path)
    kept = load_state(tmp_path / RUN)["state"]["iteration"]
    assert f"Stopped by {number.name}" in read_output(tmp_path)
    assert f"checkpoint of meta-step {kept} is kept" in read_output(tmp_path)
    assert "Traceback" not in read_output(tmp_path)
    assert_runs_equal(resume(tmp_path), uninterrupted_run)


def close_output(descriptors: Sequence[int], line: int) -> None:
    """Have nobody read what this process prints, from one of its validations on."""

    class Closing(logging.Filter):
        lines = 0

        def filter(self, record: logging.LogRecord) -> bool:
            self.lines += 1
            if self.lines == line:
                reader, writer = os.pipe()
                os.close(reader)
                for descriptor in descriptors:
                    os.dup2(writer, descriptor)
            return True

    logging.getLogger("metalearn.training.loop").addFilter(Closing())


@pytest.mark.fault("output that is closed, as by | head", "saved, exit code 141, resumes bitwise")
@pytest.mark.parametrize(("descriptors", "line"), [((1,), 1), ((1,), 2), ((1, 2), 2)], ids=["first", "one", "both"])
def test_closed_output(descriptors: Sequence[int], line: int, tmp_path: Path, uninterrupted_run: Path) -> None:
    arguments = [*SMALL_RUN, "run.checkpoint_every_s=null"]
    process = start_training(arguments, tmp_path, before=close_output, args=(descriptors, line))
    assert wait_for_exit(process) == 128 + signal.SIGPIPE, read_output(tmp_path)
    if 2 not in descriptors:
        said = " ".join(read_output(tmp_path).split())
        assert f"Stopped by SIGPIPE. The checkpoint of meta-step {8 * line} is kept. This resumes it" in said
        assert "Traceback" not in said
    assert_runs_equal(resume(tmp_path), uninterrupted_run)


def use_ascii() -> None:
    """Print and write in an ASCII locale, as ``LC_ALL=C`` without Python's UTF-8 mode."""
    locale.setlocale(locale.LC_CTYPE, "C")
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(encoding="ascii", errors="surrogateescape")


@pytest.mark.fault("an ASCII locale", "finished, with the characters that it has")
def test_ascii_locale(tmp_path: Path, uninterrupted_run: Path) -> None:
    assert wait_for_exit(start_training(SMALL_RUN, tmp_path, before=use_ascii)) == 0, read_output(tmp_path)
    assert "Logging error" not in read_output(tmp_path)
    assert re.search(r"validation accuracy \S+% \? \S+%", read_output(tmp_path))
    assert "% ± " in (tmp_path / RUN / "train.log").read_text(encoding="utf-8")
    assert_runs_equal(tmp_path / RUN, uninterrupted_run)


@pytest.mark.fault("the home folder of an unknown user", "one error that names it")
@pytest.mark.parametrize("place", ["cache", "run.init_from", "data.root"])
def test_unknown_home(place: str, tmp_path: Path) -> None:
    arguments = {"data.root": ["data=images", "data.root='~nobody-here/x'"]}.get(place, SMALL_RUN)
    arguments = [*arguments, *(["run.init_from='~nobody-here/x'"] if place == "run.init_from" else [])]
    environment = {"METALEARN_CACHE": "~nobody-here/x"} if place == "cache" else {}
    if place == "cache":
        arguments = ["data=torchvision", "data.dataset=MNIST"]
    assert wait_for_exit(start_training(arguments, tmp_path, environment=environment)) == 2
    said = " ".join(read_output(tmp_path).split())
    assert "~nobody-here/x: no home folder is known for the ~ in it" in said
    assert "Traceback" not in said


def fail_saving(number: int, first: int, last: int) -> None:
    """Make ``os.fsync`` fail in a range of its calls; nothing waits before another try."""
    calls = 0
    real = os.fsync

    def fsync(handle: int) -> None:
        nonlocal calls
        calls += 1
        if first <= calls <= last:
            raise OSError(number, os.strerror(number))
        real(handle)

    files.os.fsync = fsync  # type: ignore[attr-defined]
    files._PAUSES_S = (0.0, 0.0)


PASSING = [errno.ESTALE, errno.ETIMEDOUT, errno.EBUSY, errno.EMFILE, errno.EINTR, errno.ENFILE, errno.EAGAIN]


@pytest.mark.fault(
    "an error of a file system that passes by itself", "tried again; then said, and the training goes on"
)
@pytest.mark.parametrize("fails", ["once", "one save", "the last saves", "for good"])
@pytest.mark.parametrize("number", cases(PASSING, quick=[0]))
def test_passing_write_error(number: int, fails: str, tmp_path: Path, uninterrupted_run: Path) -> None:
    # Three calls write config.yaml, and a save makes six or, with the best parameters, twice as many.
    first, last = {"once": (50, 50), "one save": (50, 52), "the last saves": (126, 140), "for good": (50, 10**6)}[fails]
    process = start_training(SMALL_RUN, tmp_path, before=fail_saving, args=(number, first, last))
    code, said = wait_for_exit(process), " ".join(read_output(tmp_path).split())
    assert ("is not saved; the training goes on" in said) is (fails != "once"), said
    assert fails == "once" or os.strerror(number) in said
    if fails == "for good":
        assert code == 2, said
        assert "Traceback" not in said
        resume(tmp_path)
    else:
        assert code == 0, said
    assert_runs_equal(tmp_path / RUN, uninterrupted_run)


CHANGED = [["inner.lr=0.2"], ["task.shots=2", "outer.lr=0.1"], ["model.hidden=[9]"]]
CHANGED += [["run.seed=1", "inner.second_order=false"], ["data.jitter=0.1"], ["outer.iterations=30", "eval.every=5"]]


@pytest.mark.fault("resume under a changed config", "differing keys listed, refused")
@pytest.mark.parametrize("changed", cases(CHANGED, quick=[5]))
def test_resume_with_changed_config(changed: list[str], tmp_path: Path, uninterrupted_run: Path) -> None:
    run_dir = train_and_kill(tmp_path, after=8)
    before = load_state(run_dir)
    assert wait_for_exit(start_training([*SMALL_RUN, "run.resume=true", *changed], tmp_path)) == 2
    said = read_output(tmp_path)
    for key in (override.partition("=")[0] for override in changed):
        assert f"\n{key}: " in said
        assert " in the folder, " in said
    assert "run.init_from=" in said
    assert load_state(run_dir)["total_s"] == before["total_s"], "nothing was trained"
    assert_runs_equal(resume(tmp_path), uninterrupted_run)
