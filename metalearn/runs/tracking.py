"""What a run shows in TensorBoard. The tags are listed in the README."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter

from metalearn.runs.evaluation import Evaluation

if TYPE_CHECKING:  # the lab brings all lessons and matplotlib, which no training needs
    from metalearn.lab import Lesson


class Tracker:
    """Writes a run's event file; a context manager, so that nothing is lost when the run ends early."""

    def __init__(self, run_dir: Path, *, config: str) -> None:
        self._writer = SummaryWriter(str(run_dir))
        self._writer.add_text("config", f"```yaml\n{config}```")

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    def scalars(self, values: Mapping[str, float], iteration: int) -> None:
        """Points of several curves at one meta-step."""
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, iteration)

    def validation(self, result: Evaluation, iteration: int) -> None:
        """Accuracy on validation classes, with the ends of its interval as curves of their own."""
        mean, ci95 = result.accuracy.mean, result.accuracy.ci95
        self.scalars(
            {
                "validation/accuracy": mean,
                "validation/accuracy_low": mean - ci95,
                "validation/accuracy_high": mean + ci95,
            },
            iteration,
        )
        self._writer.flush()

    def test(self, result: Evaluation) -> None:
        """Test accuracy against the number of inner steps (on the step axis)."""
        for step, estimate in enumerate(result.per_step):
            self._writer.add_scalar("test/accuracy_by_inner_step", estimate.mean, step)
        if result.nontransductive:
            steps = len(result.per_step) - 1
            self._writer.add_scalar("test/accuracy_nontransductive", result.nontransductive.mean, steps)

    def image(self, tag: str, picture: NDArray[np.uint8], iteration: int) -> None:
        """A picture ``[height, width, 3]``."""
        self._writer.add_image(tag, picture, iteration, dataformats="HWC")


class LessonTracker:
    """Writes the event file of the lab; close it, as with ``contextlib.closing``."""

    def __init__(self, folder: Path) -> None:
        self._writer = SummaryWriter(str(folder))

    def lesson(self, name: str, lesson: Lesson, pictures: Mapping[str, NDArray[np.uint8]], *, seconds: float) -> None:
        """Claim, code and pictures, and every number with what it must be as a scalar of its own, at step 0."""
        self._writer.add_text(name, f"{lesson.claim}\n\n```python\n{lesson.code}\n```")
        self._writer.add_scalar(f"{name}/seconds", seconds)
        for check in lesson.checks:
            if not (isinstance(check.computed, str) or isinstance(check.expected, str)):
                self._writer.add_scalar(f"{name}/{check.what}", check.computed)
                self._writer.add_scalar(f"{name}/{check.what} (expected)", check.expected)
        for figure, picture in pictures.items():
            self._writer.add_image(f"{name}/{figure}", picture, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()
