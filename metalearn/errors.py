"""Mistakes outside the program that its user can mend; scripts print them without a stack trace."""

from __future__ import annotations

from pathlib import Path


class MetalearnError(Exception):
    """Base of the errors whose message says what was wrong, and what to do."""


class ConfigError(MetalearnError):
    """A configuration that cannot be run; the message lists every fault."""


class DataError(MetalearnError):
    """A data set that is missing, damaged or too small."""


class RunError(MetalearnError):
    """A run's folder or files that cannot be used as asked, or a training that cannot go on."""


class NonFiniteLossError(MetalearnError, ArithmeticError):
    """A support or query loss that is NaN or infinite, so that no gradient of it means anything.

    Args:
        kind: ``"support"`` or ``"query"``.
        task: which task of the batch, from 0.
        step: inner steps taken before it.
        value: the loss.
        before: the task's support loss one step earlier; ``None`` before the first.
    """

    def __init__(self, kind: str, *, task: int, step: int, value: float, before: float | None) -> None:
        self.kind, self.task, self.step, self.value, self.before = kind, task, step, value, before
        if before is None:
            why = (
                "no inner step was taken yet, so look at the task's inputs and targets, at the parameters, and for "
                "log(0), 0/0 or sqrt(0) in the model or the loss"
            )
        else:
            why = (
                f"the support loss was {before:.4g} one step earlier; take a smaller inner.lr or fewer inner.steps, or "
                "look for log(0), 0/0 or sqrt(0) in the model or the loss"
            )
        super().__init__(f"the {kind} loss of task {task} is {value} after {step} inner steps: {why}.")

    def in_batch(self, first: int) -> NonFiniteLossError:
        """The same, where the chunk that it was found in starts with task ``first`` of the batch."""
        return NonFiniteLossError(
            self.kind, task=first + self.task, step=self.step, value=self.value, before=self.before
        )


class FolderTakenError(RunError):
    """An output folder that holds another run, which would be overwritten."""

    def __init__(self, folder: Path, file: str) -> None:
        super().__init__(
            f"hydra.run.dir={folder} already holds a run (its {file}), which would be overwritten. Choose another "
            "folder, or leave hydra.run.dir out for a new one."
        )
