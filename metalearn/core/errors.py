"""Mistakes outside the program that its user can mend; scripts print them without a stack trace."""

from __future__ import annotations

import signal
from pathlib import Path

OUT_OF_MEMORY = r"(?i)out of memory|not enough memory|can('t|not) allocate memory|DefaultCPUAllocator|alloc_failed"
"""What torch's messages say where an allocator had no more to give; on CPUs such errors have no class of their own."""


class MetalearnError(Exception):
    """Base of the errors whose message says what was wrong, and what to do."""


class ConfigError(MetalearnError):
    """A configuration that cannot be run; the message lists every fault."""


class DataError(MetalearnError):
    """A data set that is missing, damaged or too small."""


class RunError(MetalearnError):
    """A run's folder or files that cannot be used as asked, or a training that cannot go on."""


class NonFiniteError(MetalearnError, ArithmeticError):
    """A number that is NaN or infinite where a training cannot go on with it.

    ``task`` of the batch, if it is known; ``stop_requested``: whether a process of the run was, meanwhile.
    """

    task: int | None = None
    stop_requested: bool = False

    def with_task_offset(self, first: int) -> NonFiniteError:
        """The same, where the chunk that it was found in starts with task ``first`` of the batch."""
        return self


class RemoteNonFiniteError(NonFiniteError):
    """What another process of the run has found among its tasks."""

    def __init__(self) -> None:
        super().__init__("another process has found a loss or a gradient that is not finite; see its message.")


class NonFiniteGradientError(NonFiniteError):
    """A derivative that is NaN or infinite although what is differentiated is finite.

    Args:
        parameter: where.
        value: one of its elements.
        task: which task of the batch, from 0; ``None`` if each task's own gradient is finite.
        step: inner steps taken before the one that the gradient did not come back through; K for the query loss.
        what: which derivative.
    """

    def __init__(
        self,
        parameter: str,
        *,
        value: float,
        task: int | None = None,
        step: int | None = None,
        what: str = "the meta-gradient",
    ) -> None:
        self.parameter, self.value, self.task, self.step, self.what = parameter, value, task, step, what
        of_task = "" if task is None else f" of task {task}"
        back = "" if step is None else f" on its way back to inner step {step}"
        of_losses = what == "the meta-gradient"
        finite = "every loss is" if of_losses else "the function is"
        smaller = ", so take a smaller inner.lr or fewer inner.steps" if of_losses else ""
        super().__init__(
            f"{what}{of_task} is {value} in parameter '{parameter}'{back}, though {finite} finite: the derivative of a "
            "sqrt, norm, log or power is infinite at 0, so add a small constant inside of it, as in "
            f"(x * x + 1e-12).sqrt(); or it overflows{smaller}."
        )

    def with_task_offset(self, first: int) -> NonFiniteGradientError:
        """As the base says."""
        task = None if self.task is None else first + self.task
        return NonFiniteGradientError(self.parameter, value=self.value, task=task, step=self.step, what=self.what)


class NonFiniteLossError(NonFiniteError):
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
        self.task: int
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

    def with_task_offset(self, first: int) -> NonFiniteLossError:
        """As the base says."""
        return NonFiniteLossError(
            self.kind, task=first + self.task, step=self.step, value=self.value, before=self.before
        )


class RunExistsError(RunError):
    """An output folder that holds another run, which would be overwritten."""

    def __init__(self, folder: Path, file: str) -> None:
        super().__init__(
            f"hydra.run.dir={folder} already holds a run (its {file}), which would be overwritten. Choose another "
            "folder, or leave hydra.run.dir out for a new one."
        )


class TerminatedError(RunError):
    """A process that was asked to end by a signal, and has put away what it had."""

    def __init__(self, number: int) -> None:
        super().__init__(f"Stopped by {signal.Signals(number).name}.")
        self.signal = number
