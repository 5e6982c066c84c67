"""What a training finds in its folder: nothing, a finished run, or what it goes on from; and what may have changed."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metalearn.config.run_config import diff_configs, load_run_config, resolve_resume, to_yaml
from metalearn.config.schema import TrainConfig
from metalearn.core.errors import RunError
from metalearn.training.checkpoints import (
    archive_and_reconfigure,
    claim_folder,
    load_latest,
    remove_unfinished,
    sync_best,
)
from metalearn.training.state import TrainState
from metalearn.training.tracking.meter import Meter

log = logging.getLogger(__name__)

_VALIDATED_BY = (
    *("task.ways", "task.shots", "eval.queries", "eval.validation_episodes", "inner.lr", "inner.eval_steps"),
    *("data.", "model.", "run.seed", "run.precision"),
)
"""Keys that a validation's accuracy depends on: figures from before a change of them compare with none after it."""


@dataclass(frozen=True)
class RunStatus:
    """A run's folder, which this process has locked and claimed.

    Args:
        run_dir: the folder.
        begun: whether another process has begun the run.
        tested: whether it has also finished it.
        content: what was put away last; ``None`` where nothing was.
        changed: keys that have another value now, as ``run.accept`` allows, and a line for each.
    """

    run_dir: Path
    begun: bool
    tested: bool
    content: dict[str, Any] | None
    changed: dict[str, str]

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        return self.tested and not self.changed

    @property
    def total_s(self) -> float:
        """Seconds that the run has taken so far."""
        return self.content["total_s"] if self.content else 0.0

    @property
    def position(self) -> dict[str, int]:
        """What ``Tracker.position`` gave at the checkpoint."""
        return self.content["event_files"] if self.content else {}


def open_run(config: TrainConfig, run_dir: Path) -> RunStatus:
    """Claim a locked folder, or find out what was begun in it.

    Raises:
        FolderTakenError: if it holds another run.
        RunError: if keys differ that were not accepted, or if every checkpoint is damaged.
    """
    resolve_resume(config, run_dir)  # again: another process may have begun the run since
    remove_unfinished(run_dir)
    path = run_dir / "config.yaml"
    if config.run.resume is False or not path.exists():
        claim_folder(run_dir, to_yaml(config))
        return RunStatus(run_dir, begun=False, tested=False, content=None, changed={})
    return RunStatus(
        run_dir,
        begun=True,
        tested=(run_dir / "metrics.json").exists(),
        content=load_latest(run_dir),
        changed=diff_configs(config, load_run_config(path)),
    )


def restore_run(state: TrainState, meter: Meter, opened: RunStatus, config: TrainConfig) -> Path | None:
    """Go on from what a run has put away.

    Args:
        state: before the first meta-step; changed in place.
        meter: likewise.
        opened: the run's folder.
        config: the run's, as it is now.

    Returns:
        Where things from before a change of the configuration are kept; ``None`` if there was none.

    Raises:
        RunError: if what was put away is of another model, or further than the run is to go.
    """
    if not opened.begun:
        return None
    if opened.content is None:
        log.warning("The run was interrupted before it could put its state away: it starts anew")
    else:
        state.restore(opened.content["state"])
        meter.restore(opened.content["meter"])
        if state.iteration > config.outer.iterations:
            raise RunError(
                f"outer.iterations={config.outer.iterations}: the run has taken {state.iteration} meta-steps already, "
                "and none can be taken back; set at least as many."
            )
        log.info("Going on from meta-step %d", state.iteration)
    sync_best(state.best, opened.run_dir)
    for line in opened.changed.values():
        log.warning("From here on, as run.accept allows: %s", line)
    if not opened.changed:
        return None
    if any(name.startswith(_VALIDATED_BY) for name in opened.changed):
        state.best, state.validated = None, 0
    return archive_and_reconfigure(
        opened.run_dir, to_yaml(config), state.iteration, tested=opened.tested, best_stays=state.best is not None
    )
