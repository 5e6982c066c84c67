"""A training's state on disk: plain containers, loaded without running any code, checked by digest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from metalearn import files
from metalearn.errors import RunError
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


def best_path(run_dir: Path) -> Path:
    """The checkpoint with the best validation accuracy."""
    return run_dir / "checkpoints" / "best.pt"


def save_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint whole, or leave the one that was there."""
    content = {
        "params": {name: p.detach().cpu() for name, p in checkpoint.params.items()},
        "iteration": checkpoint.iteration,
        "validation_accuracy": checkpoint.validation_accuracy,
    }
    files.save(content, path)


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
