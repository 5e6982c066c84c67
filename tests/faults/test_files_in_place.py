"""Other things in the place of a run's files: a folder, a file, a link, a pipe."""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path

import pytest

from metalearn.commands.processes import ProcessPool
from metalearn.core.errors import RunError
from metalearn.training.tracking.event_files import event_files
from tests.faults.cases import cases
from tests.faults.processes import read_output, start_training, wait_for_exit
from tests.faults.runs import RUN, SMALL_RUN, STEPS, resume

STATES = [f"checkpoints/state-{n:08}.pt" for n in (STEPS - 1, STEPS)]
CHECKPOINTS = ["checkpoints", "checkpoints/best.pt", *STATES]
NAMES = [*CHECKPOINTS, *(f"{name}.sha256" for name in CHECKPOINTS[1:])]
NAMES += ["config.yaml", "metrics.json", "test_tasks.json", "train.log", ".lock", "nonfinite", "evaluations"]
NAMES += ["events.out.tfevents.old", "events.out.tfevents", "events.out.tfevents.1700000000.here.1.0"]
KINDS = ["folder", "file", "dangling link", "link", "pipe"]
CASES = [*itertools.product(["new", "interrupted"], NAMES, KINDS)]
QUICK = [
    ("new", ".lock", "folder"),
    ("new", "train.log", "folder"),
    ("new", "train.log", "link"),
    ("new", "checkpoints", "dangling link"),
    ("interrupted", "checkpoints", "file"),
    ("interrupted", STATES[1], "dangling link"),
    ("interrupted", "train.log", "dangling link"),
    ("interrupted", "events.out.tfevents.old", "file"),
    ("interrupted", "config.yaml", "pipe"),
]


def put(kind: str, path: Path, outside: Path) -> None:
    """Put another thing in a place; a link points out of the run's folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir()
        (path / "note.txt").write_text("the user's")
    elif kind == "file":
        path.write_text("the user's")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(outside / kind)


@pytest.mark.fault("another thing in the place of a run's file", "one error, or passed over; nothing written elsewhere")
@pytest.mark.parametrize("case", cases(CASES, quick=[CASES.index(case) for case in QUICK]))
def test_another_thing(case: tuple[str, str, str], tmp_path: Path, uninterrupted_run: Path) -> None:
    run, name, kind = case
    outside, folder = tmp_path / "outside", tmp_path / RUN
    outside.mkdir()
    (outside / "link").write_text("precious")
    if run == "interrupted":
        shutil.copytree(uninterrupted_run, folder)
        (folder / "metrics.json").unlink()
    put(kind, folder / name, outside)
    arguments = [*SMALL_RUN, *(["run.resume=true"] if run == "interrupted" else [])]
    code = wait_for_exit(start_training(arguments, tmp_path, environment={"HYDRA_FULL_ERROR": "1"}))
    said = read_output(tmp_path)
    assert code in (0, 2), said
    assert code == 0 or str(folder) in said, said
    assert "Traceback" not in said, said
    assert "Logging error" not in said, said
    assert {path.name: path.read_text() for path in outside.iterdir()} == {"link": "precious"}
    if code == 2 and run == "interrupted" and name in ("train.log", ".lock"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        resume(tmp_path)


def test_console_that_is_a_link_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "console.log").symlink_to(tmp_path / "elsewhere")
    with ProcessPool() as pool, pytest.raises(RunError, match=r"console\.log is a link to .*elsewhere"):
        pool.run(["true"], tmp_path / "console.log", threads=None, callback=lambda piece: None)
    assert not (tmp_path / "elsewhere").exists()


def test_event_files_have_tensorboards_names(tmp_path: Path) -> None:
    names = [f"events.out.tfevents.{end}" for end in ("9.a.1.0", "old", "12.b.2.0", "10.c", "", "10.folder", "x.1")]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "events.out.tfevents.11.folder").mkdir()
    assert {path.name.split(".")[3] for path in event_files(tmp_path)} == {"9", "12", "10"}
