"""Processes that are killed, or asked to end: between meta-steps, in the middle of one, and while they save."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

from metalearn.core import serialization as files
from tests.faults.processes import finished, output, start, state_of, wait_for_state
from tests.faults.runs import RUN, SMALL, STEPS, assert_same, resume, whole
from tests.faults.suite import Row

_CALLS_A_SAVE = 9  # of os.fsync and os.replace: three files, each synced, renamed, and its folder synced


def kill_at_a_random_step(i: int, folder: Path, shared: Path) -> None:
    """Wherever in the meta-step that follows it gets it."""
    process = start([*SMALL, f"hydra.run.dir={RUN}"], folder)
    wait_for_state(folder / RUN, random.Random(i).randrange(1, STEPS), process)
    process.kill()
    assert finished(process) == -signal.SIGKILL
    assert_same(resume(folder), whole(shared))


def die_while_saving(call: int, share: float) -> None:
    """Have this process killed at a call of ``os.fsync`` or ``os.replace``, with a part of the data on disk."""
    calls = 0

    def counted(name: str) -> None:
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

    counted("fsync")
    counted("replace")


def kill_during_a_save(i: int, folder: Path, shared: Path) -> None:
    """Every stage of a save in turn, at a random one."""
    draw = random.Random(i)
    saves = draw.randrange(1, STEPS - 1)
    call = 3 + _CALLS_A_SAVE * saves + i % _CALLS_A_SAVE  # the first three write config.yaml
    process = start([*SMALL, f"hydra.run.dir={RUN}"], folder, before=die_while_saving, given=(call, draw.random()))
    assert finished(process) == -signal.SIGKILL, output(folder)
    at = state_of(folder / RUN)["state"]["iteration"]
    newest = max(int(p.name.split("-")[1][:8]) for p in (folder / RUN / "checkpoints").glob("*state-*"))
    assert newest - at <= 1, f"the state after {newest} was being saved, and {at} is what is left"
    run_dir = resume(folder)
    assert "damaged" not in output(folder), "what is picked up is whole"
    assert not list((run_dir / "checkpoints").glob(".*")), "nothing half-written is left"
    assert_same(run_dir, whole(shared))


def ask_to_end(i: int, folder: Path, shared: Path) -> None:
    """SIGTERM and SIGINT in turn."""
    number, code = ((signal.SIGTERM, 143), (signal.SIGINT, 130))[i % 2]
    process = start([*SMALL, "run.checkpoint_every_s=null", f"hydra.run.dir={RUN}"], folder)
    wait_for_state(folder / RUN, 8, process)  # the first validation's: no other is saved unasked
    os.kill(process.pid or 0, number)
    assert finished(process) == code, output(folder)
    kept = state_of(folder / RUN)["state"]["iteration"]
    assert f"Stopped by {number.name}" in output(folder)
    assert f"checkpoint of meta-step {kept} is kept" in output(folder)
    assert "Traceback" not in output(folder)
    assert_same(resume(folder), whole(shared))


KILLED = Row(
    "kill",
    "kill -9 at a random step, resume",
    "final parameters, optimiser, random states, metrics and curves bitwise equal to the uninterrupted run",
    tries=20,
    attempt=kill_at_a_random_step,
    short=(0,),
    seconds=4,
)
KILLED_SAVING = Row(
    "kill_saving",
    "kill -9 during a save",
    "no unreadable checkpoint is ever picked up; at most one save interval lost",
    tries=50,
    attempt=kill_during_a_save,
    short=(4,),
    seconds=4,
)
SIGNALS = Row(
    "signals",
    "SIGTERM, SIGINT",
    "saved, right exit code, resumes bitwise",
    tries=20,
    attempt=ask_to_end,
    short=(0, 1),
    seconds=4,
)
