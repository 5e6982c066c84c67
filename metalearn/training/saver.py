"""When a training's state is put away, and everything that goes with it."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path

from metalearn.core.errors import RunError
from metalearn.training.checkpoints import load_latest, save_best, save_state
from metalearn.training.state import TrainState
from metalearn.training.tracking.meter import Meter
from metalearn.training.tracking.tensorboard import TensorBoardLogger

log = logging.getLogger(__name__)


@dataclass
class Checkpointer:
    """Puts the state of a training away, now and then; only the first process has one.

    Args:
        run_dir: the run's folder.
        config_yaml: the run's configuration, which goes with the state.
        meter: its times and open window go with the state.
        tracker: what it has shown is written before the state is.
        every_s: seconds between two checkpoints; ``None``: only at validations.
        began: when the run would have begun without its interruptions, on the clock of ``time.perf_counter``.
    """

    run_dir: Path
    config_yaml: str
    meter: Meter
    tracker: TensorBoardLogger
    every_s: float | None
    began: float
    _saved_at: float = field(default_factory=time.perf_counter)
    _best_saved: int | None = None

    @property
    def due(self) -> bool:
        """Whether it is time."""
        return self.every_s is not None and time.perf_counter() - self._saved_at >= self.every_s

    @property
    def total_s(self) -> float:
        """Seconds that the run has taken so far, over all its processes in turn."""
        return time.perf_counter() - self.began

    def save(self, state: TrainState) -> None:
        """Put it away, between two meta-steps."""
        with self.meter.checkpoint():
            content = {
                "config": self.config_yaml,
                "state": state.content(),
                "meter": self.meter.content(),
                "event_files": self.tracker.position(),
                "total_s": self.total_s,
            }
            save_state(content, state.iteration, self.run_dir)
            if state.best and state.best.iteration != self._best_saved:
                save_best(state.best, self.run_dir)
                self._best_saved = state.best.iteration
        self._saved_at = time.perf_counter()

    def save_at_the_end(self, state: TrainState) -> None:
        """Put away what a run that cannot go on now can go on from later."""
        if not (state.whole and state.finite()):
            return
        try:
            self.save(state)
        except OSError as error:
            log.warning("The state after meta-step %d could not be saved: %s", state.iteration, error)

    def kept(self) -> str:
        """A sentence that says what there is to go on from; empty if there is nothing."""
        try:
            content = load_latest(self.run_dir)
        except RunError:  # all are damaged: no reason to hide why the run ends
            content = None
        if content is None:
            return ""
        return (
            f"The checkpoint of meta-step {content['state']['iteration']} is kept; go on from it with "
            f"hydra.run.dir={self.run_dir} run.resume=true."
        )
