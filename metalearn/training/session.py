"""One process of a training: what it computes with, where it shows and saves, and when it is asked to end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress

from metalearn.core.types import Params
from metalearn.training.evaluate_run import evaluate_distributed
from metalearn.training.evaluation import Evaluation
from metalearn.training.experiment import Experiment
from metalearn.training.runtime.distributed import DistributedContext
from metalearn.training.runtime.signals import StopRequest
from metalearn.training.saver import Checkpointer
from metalearn.training.tracking.meter import Meter
from metalearn.training.tracking.tensorboard import TensorBoardLogger


@dataclass(frozen=True)
class TrainContext:
    """What a training works with in one process.

    Args:
        experiment: what is computed with.
        run_dir: the run's folder.
        meter: of times and memory.
        stop: whether the process was asked to end.
        progress: for bars.
        ranks: the processes of the run.
        saver: of the state; ``None`` in all processes but the first.
    """

    experiment: Experiment
    run_dir: Path
    meter: Meter
    stop: StopRequest
    progress: Progress
    ranks: DistributedContext
    saver: Checkpointer | None

    @property
    def tracker(self) -> TensorBoardLogger | None:
        """For the curves; ``None`` in all processes but the first."""
        return self.saver.tracker if self.saver else None

    def evaluate(self, params: Params, *, test: bool) -> Evaluation:
        """Accuracy on validation or test tasks, of which every process takes a share.

        Raises:
            StoppedError: if a process that is alone is asked to end.
            LostProcessError: if a process is gone.
        """
        settings = self.experiment.config.eval
        episodes = settings.episodes if test else settings.validation_episodes
        bar = self.progress.add_task("test", total=episodes, note="") if test else None

        def show(done: int) -> None:
            if bar is not None:
                self.progress.update(bar, completed=min(done * self.ranks.size, episodes))
            if self.ranks.size == 1:
                self.stop.refuse_to_go_on()

        return evaluate_distributed(self.experiment, params, episodes, test=test, ranks=self.ranks, progress=show)
