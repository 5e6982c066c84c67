"""Checkpoints that are not what was written: a flipped bit, a cut, code in place of tensors."""

from __future__ import annotations

import hashlib
import logging
import pickle
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from metalearn.training.checkpoints import best_path, load_best, load_latest, state_paths
from tests.faults.processes import output
from tests.faults.runs import RUN, STEPS, assert_same, bits, resume, whole
from tests.faults.suite import Row


@contextmanager
def said() -> Iterator[list[str]]:
    """What is logged meanwhile."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("metalearn")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


def copied(folder: Path, shared: Path) -> Path:
    """A copy of the uninterrupted run."""
    return Path(shutil.copytree(whole(shared), folder / RUN))


def unfinished(run_dir: Path) -> Path:
    """As if the run had been killed before its test."""
    (run_dir / "metrics.json").unlink()
    return run_dir


def flip_a_bit(i: int, folder: Path, shared: Path) -> None:
    """In the newest state, in its digest, or in the best parameters: in turns of ten, one, and four."""
    run_dir = copied(folder, shared)
    newest, before = state_paths(run_dir)
    path = best_path(run_dir) if i % 15 > 10 else newest
    path = path.with_name(path.name + ".sha256") if i % 15 == 10 else path
    data = bytearray(path.read_bytes())
    bit = random.Random(i).randrange(8 * (64 if path.suffix == ".sha256" else len(data)))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    with said() as lines:
        if path == best_path(run_dir):
            expected = load_latest(run_dir)
            assert expected is not None
            like = expected["state"]["params"]
            best = load_best(run_dir, like=like, device=torch.device("cpu"))
            assert bits([best.iteration, best.validation_score, best.params]) == bits(expected["state"]["best"])
        else:
            assert state_of_file(before) == bits(load_latest(run_dir))
    assert any(str(best_path(run_dir) if "best" in path.name else newest) in line for line in lines), lines


def state_of_file(path: Path) -> Any:
    """The content of an undamaged file."""
    return bits(torch.load(path, weights_only=True))


def cut(i: int, folder: Path, shared: Path) -> None:
    """The newest state at 0, 10, 50, 90 and 99% of its length; then the run goes on from the one before."""
    run_dir = unfinished(copied(folder, shared))
    newest = state_paths(run_dir)[0]
    data = newest.read_bytes()
    newest.write_bytes(data[: len(data) * (0, 10, 50, 90, 99)[i] // 100])
    assert_same(resume(folder), whole(shared))
    said = " ".join(output(folder).split())
    assert "is damaged" in said
    assert f"The one before it is taken: state-{STEPS - 1:08}.pt" in said
    assert f"Going on from meta-step {STEPS - 1}" in output(folder)


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return (open, (self.path, "w"))


def swallow_a_pickle(i: int, folder: Path, shared: Path) -> None:
    """As a state in torch's format, as a plain pickle, and deep in the best parameters; the digests fit."""
    run_dir = unfinished(copied(folder, shared))
    mark = folder / "it ran"
    newest, _ = state_paths(run_dir)
    path = best_path(run_dir) if i == 2 else newest
    if i == 1:
        path.write_bytes(pickle.dumps(Bomb(mark)))
    else:
        content = torch.load(path, weights_only=True)
        torch.save({**content, "params": {"head.bias": [Bomb(mark)]}}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_name(path.name + ".sha256").write_text(digest + "\n")
    if i == 2:
        with said() as lines:
            load_best(
                run_dir, like=torch.load(newest, weights_only=True)["state"]["params"], device=torch.device("cpu")
            )
        assert any("is refused" in line and "could run code" in line for line in lines)
    assert_same(resume(folder), whole(shared))
    assert i == 2 or "is refused" in output(folder)
    assert not mark.exists()


FLIPPED = Row(
    "flipped_bit",
    "one flipped bit in a checkpoint",
    "every one detected; falls back to the one before, and says so",
    tries=300,
    attempt=flip_a_bit,
    short=(0, 10, 11),
    seconds=0.03,
)
CUT = Row(
    "cut",
    "checkpoint cut at 0, 10, 50, 90, 99%",
    "every one detected; falls back to the one before, and says so",
    tries=5,
    attempt=cut,
    short=(2,),
    seconds=3,
)
PICKLES = Row(
    "pickle",
    "malicious pickle as a checkpoint",
    "refused, no side effect",
    tries=3,
    attempt=swallow_a_pickle,
    short=(0,),
    seconds=3,
)
