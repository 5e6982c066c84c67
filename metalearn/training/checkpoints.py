"""Checkpoints on disk: plain containers, loaded without running code, and verified by digest.

``state-ITERATION.pt`` is everything that a resumed training needs, the best parameters included; the last two are kept,
so that there is a fallback for a damaged one. ``best.pt`` holds the best parameters once more, for the test.
Both hold the configuration of their run, so that those of another run are not taken.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from metalearn.config.run_config import changed_keys, parse_run_config
from metalearn.config.schema import result_keys
from metalearn.config.yaml_limits import read_yaml
from metalearn.core import serialization as files
from metalearn.core.errors import OS_ERROR_HINTS, ConfigError, RunError
from metalearn.core.text import preview_names
from metalearn.core.types import Params
from metalearn.pretrained.model_file import read_model
from metalearn.training.run_folder import TRAINING_FILES, check_no_run_in
from metalearn.training.state import BestCheckpoint, TrainState, check_same_shapes, equal_params
from metalearn.training.tracking.meter import Meter
from metalearn.training.tracking.tensorboard import TensorBoardLogger

log = logging.getLogger(__name__)

_NUM_KEPT = 2
_FORMAT = 1


@dataclass
class Checkpointer:
    """Saves the training state; only the main process has one.

    It saves every ``every_s`` seconds, or only at validations. ``started_at`` is when the run would have started
    without interruptions, on the clock of ``time.perf_counter``.
    """

    run_dir: Path
    config_yaml: str
    meter: Meter
    tensorboard: TensorBoardLogger
    every_s: float | None
    started_at: float
    _saved_at: float = field(default_factory=time.perf_counter)
    _saved_best: int | None = None
    _failed: bool = False

    @property
    def is_due(self) -> bool:
        """True if ``every_s`` has passed since the last checkpoint."""
        return self.every_s is not None and time.perf_counter() - self._saved_at >= self.every_s

    @property
    def total_s(self) -> float:
        """Seconds that the run has taken so far, before and after interruptions."""
        return time.perf_counter() - self.started_at

    def save(self, state: TrainState) -> None:
        """Save the state, between two meta-steps; after an error that may pass by itself, warn and wait for the next.

        A parameter that is not finite is not saved: the training will stop for it, and resume from the state before.

        Raises:
            OSError: if the user has to do something about it, as where the disk is full.
        """
        try:
            if state.is_finite():
                self._save(state)
        except OSError as error:
            if error.errno in OS_ERROR_HINTS:
                raise
            self._failed = True
            self._saved_at = time.perf_counter()
            log.warning("The state after meta-step %d is not saved; the training goes on: %s", state.iteration, error)

    def finish(self, state: TrainState) -> None:
        """Save the state at the end if that failed the last time; raise ``OSError`` if it still does."""
        if self._failed:
            self._save(state)

    def _save(self, state: TrainState) -> None:
        with self.meter.checkpoint():
            if not (path := self.run_dir / "config.yaml").exists():
                log.warning("%s is gone; it is written again, as the run cannot be resumed without it", path)
                files.atomic_write_text(path, self.config_yaml)
            content = {
                "config": self.config_yaml,
                "state": state.state_dict(),
                "meter": self.meter.state_dict(),
                "event_files": self.tensorboard.file_sizes(),
                "total_s": self.total_s,
            }
            save_state(content, state.iteration, self.run_dir)
            if state.best and state.best.iteration != self._saved_best:
                save_best(state.best, self.run_dir, self.config_yaml)
                self._saved_best = state.best.iteration
        self._failed = False
        self._saved_at = time.perf_counter()

    def save_on_exit(self, state: TrainState) -> None:
        """Save the state of a run that stops early, unless the parameters are inconsistent or not finite."""
        try:
            if state.is_consistent and state.is_finite():
                self._save(state)
        except Exception as error:  # of any kind, as it must not hide why the run ends
            log.warning("The state after meta-step %d could not be saved: %s", state.iteration, error)

    def describe_latest(self) -> str:
        """Return a sentence that names the latest checkpoint; empty if there is none."""
        try:
            content = load_latest(self.run_dir)
        except Exception:  # all are damaged, or memory lacks, which must not hide why the run ends
            content = None
        if content is None:
            return ""
        return f"The checkpoint of meta-step {content['state']['iteration']} is kept."


def claim_folder(run_dir: Path, config_yaml: str) -> None:
    """Write ``config.yaml`` into a locked folder; raise ``RunExistsError`` if it holds another run."""
    check_no_run_in(run_dir, TRAINING_FILES)
    files.atomic_write_text(run_dir / "config.yaml", config_yaml)


def best_path(run_dir: Path) -> Path:
    """Return the path of the checkpoint with the best validation score."""
    return run_dir / "checkpoints" / "best.pt"


def state_path(run_dir: Path, iteration: int) -> Path:
    """Return the path of the state after ``iteration`` meta-steps."""
    return run_dir / "checkpoints" / f"state-{iteration:08}.pt"


def state_paths(run_dir: Path) -> list[Path]:
    """Return the saved states, newest first."""
    return sorted((run_dir / "checkpoints").glob("state-*.pt"), reverse=True)


def save_state(content: dict[str, Any], iteration: int, run_dir: Path) -> None:
    """Save a state of plain containers atomically, then remove the superseded ones."""
    path = state_path(run_dir, iteration)
    files.save_checked({"format": _FORMAT, **content}, path)
    earlier = [other for other in state_paths(run_dir) if other < path]
    later = [other for other in state_paths(run_dir) if other > path]  # damaged, or the run resumed from before them
    for other in [*later, *earlier[_NUM_KEPT - 1 :]]:
        files.remove(other)
    for digest in path.parent.glob("state-*.sha256"):
        if not digest.with_suffix("").exists():  # a kill came between the removal of the two
            digest.unlink()


def remove_unfinished(run_dir: Path) -> None:
    """Remove temporary files of a process that was killed while writing into a locked folder."""
    for folder in (run_dir, run_dir / "checkpoints"):
        files.remove_temporary_files(folder)


def load_latest(run_dir: Path) -> dict[str, Any] | None:
    """Load the run's newest undamaged state; ``None`` if there is none yet.

    Raises:
        RunError: if all are damaged or another run's.
    """
    damaged: list[str] = []
    for path in state_paths(run_dir):
        try:
            content: dict[str, Any] = files.load_checked(path)
        except (files.CorruptFileError, FileNotFoundError) as error:  # a link to nowhere is not found
            damaged.append(str(error))
            continue
        if not isinstance(content, dict) or not {"format", "state", "meter"} <= content.keys():
            damaged.append(f"{path} is refused: it is no state of a training.")
            continue
        if content["format"] != _FORMAT:
            raise RunError(
                f"{path}: its format is {content['format']}, and this version of metalearn reads {_FORMAT}; resume "
                "with the version that wrote it."
            )
        if reason := _other_run(content, run_dir):
            damaged.append(f"{path} is refused: {reason}.")
            continue
        for message in damaged:
            log.warning("%s The one before it is taken: %s.", message, path.name)
        return content
    if damaged:
        raise RunError(
            f"{run_dir}: every checkpoint is damaged or another run's, so there is nothing to resume from. Restore one "
            "from a copy, or start a new run in another folder.\n" + "\n".join(damaged)
        )
    return None


def save_best(best: BestCheckpoint, run_dir: Path, config_yaml: str) -> None:
    """Write ``best.pt`` atomically."""
    content = {"params": best.params, "iteration": best.iteration, "validation_accuracy": best.validation_score}
    files.save_checked({"config": config_yaml, **content}, best_path(run_dir))


def restore_best(best: BestCheckpoint | None, run_dir: Path, config_yaml: str) -> None:
    """Write ``best.pt`` as a restored state has it, if it differs: a kill may have come between writing the two."""
    if best is None:
        files.remove(best_path(run_dir))
        return
    try:
        found = _read_best(run_dir)
    except (FileNotFoundError, files.CorruptFileError):
        found = None
    if found is None or found[:2] != best[:2] or not equal_params(found.params, best.params):
        save_best(best, run_dir, config_yaml)


def load_best(run: Path, *, like: Params, device: torch.device) -> BestCheckpoint:
    """Load a run's best parameters: of a model file, or of a folder's ``best.pt``.

    If that is damaged or missing, they are taken from the latest state.

    Raises:
        RunError: if they are missing, damaged, or do not fit the parameters ``like``.
    """
    if run.is_file():
        params, record = read_model(run)
        best, path = BestCheckpoint(record.iteration, record.validation_score, params), run
    else:
        best, path = _load_best_of_folder(run), best_path(run)
    try:
        check_same_shapes(best.params, like)
    except RunError as error:
        raise RunError(f"{path}: {error}") from None
    return best._replace(params={name: p.to(device) for name, p in best.params.items()})


def _load_best_of_folder(run_dir: Path) -> BestCheckpoint:
    try:
        return _read_best(run_dir)
    except (FileNotFoundError, files.CorruptFileError) as error:
        missing = isinstance(error, FileNotFoundError)
        reason = f"{best_path(run_dir)} does not exist." if missing else str(error)
        state = load_latest(run_dir)
        if state is None or state["state"]["best"] is None:
            why = " The run has not reached its first validation, or was copied without it." if missing else ""
            raise RunError(reason + why) from None
        log.warning("%s The best parameters are taken from the state instead.", reason)
        return BestCheckpoint(*state["state"]["best"])


def _read_best(run_dir: Path) -> BestCheckpoint:
    path = best_path(run_dir)
    content: dict[str, Any] = files.load_checked(path)
    keys = {"params", "iteration", "validation_accuracy"}
    if not isinstance(content, dict) or not keys <= content.keys() or not isinstance(content["params"], dict):
        raise files.CorruptFileError(f"{path} is refused: it holds no best parameters.")
    if reason := _other_run(content, run_dir):
        raise files.CorruptFileError(f"{path} is refused: {reason}.")
    return BestCheckpoint(content["iteration"], content["validation_accuracy"], content["params"])


def _other_run(content: dict[str, Any], run_dir: Path) -> str:
    """Return why a checkpoint cannot be this run's: its configuration has another seed, say; empty if it may be.

    Two runs with one configuration are the same run, bit by bit; where the run is and what it began with may be given
    another place. ``best.pt`` of earlier releases has no configuration.
    """
    path, recorded = run_dir / "config.yaml", content.get("config")
    if recorded is None or not path.exists():
        return ""
    here = read_yaml(path)
    if recorded == here:
        return ""
    try:
        if not isinstance(recorded, str):
            raise ConfigError("it is no text")
        there = result_keys(parse_run_config(recorded, path))
    except ConfigError:
        return "its configuration cannot be read"
    changed = changed_keys(result_keys(parse_run_config(here, path)), there)
    names = [name for name in changed if name not in ("run.init_from", "run.device")]
    return f"another run wrote it, with another {preview_names(names)}" if names else ""
