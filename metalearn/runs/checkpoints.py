"""A run's claim to its folder, and its state on disk: plain containers, loaded without code, checked by digest.

``best.pt`` holds the parameters with the best validation accuracy, which are tested; ``last.pt`` what a training goes
on from.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from metalearn import files
from metalearn.errors import FolderTakenError, RunError
from metalearn.runs.meter import Meter
from metalearn.runs.state import TrainState
from metalearn.types import Params


@dataclass(frozen=True)
class Checkpoint:
    """What is needed to test a run.

    Args:
        params: meta-parameters.
        iteration: meta-steps that were taken.
        validation_accuracy: of these parameters, as a fraction.
    """

    params: Params
    iteration: int
    validation_accuracy: float


def claim(run_dir: Path, config_yaml: str) -> None:
    """Make a locked folder this run's own for good, by its ``config.yaml``.

    Raises:
        FolderTakenError: if it is another run's.
    """
    path = run_dir / "config.yaml"
    if path.exists():
        raise FolderTakenError(run_dir, path.name)
    files.write_text(path, config_yaml)


def best_path(run_dir: Path) -> Path:
    """The checkpoint with the best validation accuracy."""
    return run_dir / "checkpoints" / "best.pt"


def last_path(run_dir: Path) -> Path:
    """The state after the latest validation, of which the training can be resumed."""
    return run_dir / "checkpoints" / "last.pt"


def save_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint whole, or leave the one that was there."""
    content = {
        "params": {name: p.detach().cpu() for name, p in checkpoint.params.items()},
        "iteration": checkpoint.iteration,
        "validation_accuracy": checkpoint.validation_accuracy,
    }
    files.save(content, path)


def save_state(state: TrainState, meter: Meter, *, total_s: float, run_dir: Path) -> None:
    """Put away what a training goes on from.

    Args:
        state: between two meta-steps.
        meter: between two windows.
        total_s: seconds that the run has taken so far, over all its processes.
        run_dir: its folder.
    """
    files.save({"state": state.content(), "meter": meter.content(), "total_s": total_s}, last_path(run_dir))


def load_state(state: TrainState, meter: Meter, *, run_dir: Path) -> float:
    """Take up what ``save_state`` put away, if it came to that.

    Returns:
        ``total_s``; 0 where the run has not reached its first validation, and starts anew.

    Raises:
        RunError: if the file is damaged.
    """
    try:
        content = files.load(last_path(run_dir), device=meter.device)
    except FileNotFoundError:
        return 0.0
    state.restore(content["state"])
    meter.restore(content["meter"])
    total_s: float = content["total_s"]
    return total_s


def load_checkpoint(path: Path, *, like: Params, device: torch.device) -> Checkpoint:
    """Read a checkpoint of a model with parameters like these.

    Raises:
        RunError: if it is missing, damaged, or of another model.
    """
    try:
        content: dict[str, Any] = files.load(path, device=device)
    except FileNotFoundError:
        raise RunError(
            f"{path} does not exist: the run has not reached its first validation, or was copied without it."
        ) from None
    params = content["params"]
    want, have = ({name: tuple(p.shape) for name, p in tree.items()} for tree in (like, params))
    if want != have:
        raise RunError(f"{path} does not fit the model of the run's config.yaml: parameters {have} and not {want}.")
    return Checkpoint(params, content["iteration"], content["validation_accuracy"])
