"""Open a run's folder, new, finished or to resume, and restore its state or start from another run's parameters."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from metalearn.config.run_config import load_trusted_config, resolve_resume, to_yaml
from metalearn.config.schema import TrainConfig, iter_fields
from metalearn.core.errors import ConfigError, RunError
from metalearn.core.json_files import read_metrics
from metalearn.core.types import Params
from metalearn.pretrained.model_file import find_run
from metalearn.training.checkpoints import claim_folder, load_best, load_latest, remove_unfinished, restore_best
from metalearn.training.state import BestCheckpoint, TrainState
from metalearn.training.tracking.meter import Meter

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunStatus:
    """A run's folder, locked and claimed by this process.

    Args:
        started: whether another process has started the run.
        checkpoint: the latest, if there is one.
        initial: parameters of ``run.init_from``, if the run starts from those.
    """

    run_dir: Path
    started: bool = False
    is_finished: bool = False
    checkpoint: dict[str, Any] | None = None
    initial: BestCheckpoint | None = None

    @property
    def total_s(self) -> float:
        """Seconds that the run has taken so far."""
        return self.checkpoint["total_s"] if self.checkpoint else 0.0

    @property
    def file_sizes(self) -> dict[str, int]:
        """Bytes of every event file at the checkpoint."""
        return self.checkpoint["event_files"] if self.checkpoint else {}


def open_run(config: TrainConfig, run_dir: Path, *, theta: Params, device: torch.device) -> RunStatus:
    """Claim a locked folder for a new run, or find out how far the run in it has come.

    Parameters of ``run.init_from`` must fit ``theta``.

    Raises:
        RunExistsError: if the folder holds another run.
        RunError: if the configuration differs, ``metrics.json`` or every checkpoint is damaged, or ``run.init_from``
            cannot be used.
    """
    resolve_resume(config, run_dir)  # again: another process may have started the run since
    remove_unfinished(run_dir)
    started = config.run.resume is not False and (run_dir / "config.yaml").exists()
    is_finished = started and read_metrics(run_dir) is not None
    checkpoint = load_latest(run_dir) if started else None
    initial = None
    if config.run.init_from is not None and checkpoint is None and not is_finished:
        initial = _load_initial(Path(config.run.init_from), run_dir, theta, device)
    if not started:
        claim_folder(run_dir, to_yaml(config))
    return RunStatus(run_dir, started, is_finished, checkpoint, initial)


def _load_initial(source: Path, run_dir: Path, theta: Params, device: torch.device) -> BestCheckpoint:
    """Return the best parameters of the run that ``run.init_from`` names."""
    if source.resolve() == run_dir.resolve():
        raise RunError(f"run.init_from={source}: this is the run's own folder; resume it with run.resume=true instead.")
    try:
        found = source if source.is_dir() else find_run(source)
    except RunError as error:
        raise RunError(f"run.init_from={error}") from error
    try:
        best = load_best(found, like=theta, device=device)
    except RunError as error:
        raise RunError(f"run.init_from={source}: {error}{_describe_model(found)}") from error
    log.info("Starting from the best parameters of %s, those of its meta-step %d", source, best.iteration)
    return best


def _describe_model(run: Path) -> str:
    """Return the keys that a run must have to take another's parameters, as that has them."""
    try:
        config = load_trusted_config(run, trust_code=True)  # nothing of it is run
    except (ConfigError, RunError):
        return ""
    model = " ".join(f"{key}={value}" for key, value in iter_fields(config.model, "model.") if key != "model.name")
    keys = f"algorithm={config.algorithm.name} task.ways={config.task.ways} model={config.model.name} {model}"
    return f" It was trained with {keys.strip()}."


def restore_run(state: TrainState, meter: Meter, status: RunStatus, config_yaml: str) -> None:
    """Restore the latest checkpoint, or else copy the parameters that the run starts from.

    A run that starts from another's parameters validates them before its first meta-step. Raise ``RunError`` if the
    checkpoint belongs to another model.
    """
    if status.checkpoint:
        state.load_state_dict(status.checkpoint["state"])
        meter.load_state_dict(status.checkpoint["meter"])
        log.info("Resuming from meta-step %d", state.iteration)
    elif status.started:
        log.warning("The run was interrupted before its first checkpoint: it starts again")
    if status.initial:
        state.load_params(status.initial.params)
        state.last_validated = -1
    if status.started:
        restore_best(state.best, status.run_dir, config_yaml)
