"""A run's claim to its folder, and its state on disk: plain containers, loaded without code, checked by digest.

``state-ITERATION.pt`` is all that a training goes on from, the best parameters so far included; the last two are kept,
so that there is one before a damaged one. ``best.pt`` holds the best parameters once more, for the test.
"""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import torch

from metalearn.config.run_folder import TRAINING_FILES, check_no_run_in
from metalearn.core import serialization as files
from metalearn.core.errors import RunError
from metalearn.core.types import Params
from metalearn.training.state import BestCheckpoint, check_same_shapes

log = logging.getLogger(__name__)

_KEPT = 2
_FORMAT = 1


def claim_folder(run_dir: Path, config_yaml: str) -> None:
    """Make a locked folder this run's own for good, by its ``config.yaml``.

    Raises:
        FolderTakenError: if it is another run's, or this one's without its configuration.
    """
    check_no_run_in(run_dir, TRAINING_FILES)
    files.atomic_write_text(run_dir / "config.yaml", config_yaml)


def best_path(run_dir: Path) -> Path:
    """The checkpoint with the best validation accuracy."""
    return run_dir / "checkpoints" / "best.pt"


def state_path(run_dir: Path, iteration: int) -> Path:
    """The state after that many meta-steps."""
    return run_dir / "checkpoints" / f"state-{iteration:08}.pt"


def state_paths(run_dir: Path) -> list[Path]:
    """States that are on disk, the newest first."""
    return sorted((run_dir / "checkpoints").glob("state-*.pt"), reverse=True)


def save_state(content: dict[str, Any], iteration: int, run_dir: Path) -> None:
    """Put a state away, whole or not at all; then remove those that it makes superfluous.

    Args:
        content: plain containers.
        iteration: meta-steps taken.
        run_dir: the run's folder.
    """
    path = state_path(run_dir, iteration)
    files.save_checked({"format": _FORMAT, **content}, path)
    earlier = [other for other in state_paths(run_dir) if other < path]
    later = [other for other in state_paths(run_dir) if other > path]  # damaged, or the run went on from before them
    for other in [*later, *earlier[_KEPT - 1 :]]:
        files.remove(other)
    for digest in path.parent.glob("state-*.sha256"):
        if not digest.with_suffix("").exists():  # a kill came between the removal of the two
            digest.unlink()


def remove_unfinished(run_dir: Path) -> None:
    """Remove what a process that was killed while it wrote has left in a locked folder."""
    for folder in (run_dir, run_dir / "checkpoints"):
        files.remove_temporary_files(folder)


def load_latest(run_dir: Path) -> dict[str, Any] | None:
    """The newest state that is whole; ``None`` where none was saved yet.

    Raises:
        RunError: if there are some, and all are damaged.
    """
    damaged: list[str] = []
    for path in state_paths(run_dir):
        try:
            content: dict[str, Any] = files.load_checked(path)
        except files.CorruptFileError as error:
            damaged.append(str(error))
            continue
        if not isinstance(content, dict) or not {"format", "state", "meter"} <= content.keys():
            damaged.append(f"{path} is refused: it is no state of a training.")
            continue
        if content["format"] != _FORMAT:
            raise RunError(
                f"{path}: its format is {content['format']}, and this version of metalearn reads {_FORMAT}; go on "
                "with the version that wrote it."
            )
        for what in damaged:
            log.warning("%s The one before it is taken: %s.", what, path.name)
        return content
    if damaged:
        raise RunError(
            f"{run_dir}: every checkpoint is damaged, so there is nothing to go on from. Restore one from a copy, or "
            "start anew in another folder.\n" + "\n".join(damaged)
        )
    return None


def save_best(best: BestCheckpoint, run_dir: Path) -> None:
    """Write ``best.pt`` whole, or leave the one that was there."""
    content = {
        "params": best.params,
        "iteration": best.iteration,
        "validation_accuracy": best.validation_score,
    }
    files.save_checked(content, best_path(run_dir))


def sync_best(best: BestCheckpoint | None, run_dir: Path) -> None:
    """Have ``best.pt`` agree with a state that a run goes on from: a kill may have come between the two."""
    if best is None:
        files.remove(best_path(run_dir))
        return
    try:
        found = files.load_checked(best_path(run_dir))["iteration"]
    except (FileNotFoundError, files.CorruptFileError):
        found = None
    if found != best.iteration:
        save_best(best, run_dir)


def load_best(run_dir: Path, *, like: Params, device: torch.device) -> BestCheckpoint:
    """The best parameters of a run, from ``best.pt``, or, if that is damaged or gone, from the newest state.

    Args:
        run_dir: the run's folder.
        like: parameters of the model that they must fit.
        device: where they are wanted.

    Raises:
        RunError: if they are missing, damaged, or of another model.
    """
    path = best_path(run_dir)
    try:
        content: dict[str, Any] = files.load_checked(path)
        best = BestCheckpoint(content["iteration"], content["validation_accuracy"], content["params"])
    except (FileNotFoundError, files.CorruptFileError) as error:
        missing = isinstance(error, FileNotFoundError)
        what = f"{path} does not exist." if missing else str(error)
        state = load_latest(run_dir)
        if state is None or state["state"]["best"] is None:
            why = " The run has not reached its first validation, or was copied without it." if missing else ""
            raise RunError(what + why) from None
        best = BestCheckpoint(*state["state"]["best"])
        log.warning("%s The best parameters are taken from the state instead.", what)
    try:
        check_same_shapes(best.params, like)
    except RunError as error:
        raise RunError(f"{path}: {error}") from None
    return best._replace(params={name: p.to(device) for name, p in best.params.items()})


def archive_and_reconfigure(run_dir: Path, config_yaml: str, iteration: int, *, tested: bool, best_stays: bool) -> Path:
    """Give a run that goes on another configuration, and keep what belongs to the earlier one.

    Args:
        run_dir: the run's folder.
        config_yaml: the configuration from here on.
        iteration: meta-steps taken.
        tested: whether the run was finished, so that its figures are kept as well.
        best_stays: whether ``best.pt`` may still be the best; else it is kept with the rest.

    Returns:
        The folder of what is kept, ``until-ITERATION``.
    """
    numbers = itertools.chain([""], (f"-{i}" for i in itertools.count(2)))
    kept = next(folder for more in numbers if not (folder := run_dir / f"until-{iteration}{more}").exists())
    config, best = run_dir / "config.yaml", best_path(run_dir)
    files.atomic_write_text(kept / config.name, config.read_text())
    if not best_stays and best.exists():
        files.save_checked(files.load_checked(best), best_path(kept))
        files.remove(best)
    for name in ("metrics.json", "test_tasks.json") if tested else ():
        (run_dir / name).replace(kept / name)
    files.atomic_write_text(config, config_yaml)  # last: a kill before it leaves the change to be made again
    return kept
