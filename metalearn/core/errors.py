"""Errors that a user can fix; scripts print them without a traceback."""

from __future__ import annotations

import errno
import re
import signal
from pathlib import Path

from metalearn.core.text import plural

OUT_OF_MEMORY = r"(?i)out of memory|not enough memory|can('t|not) allocate memory|DefaultCPUAllocator|alloc_failed"
"""Pattern of torch's messages for running out of memory, which on CPUs has no exception class."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a GPU's or a CPU's allocator failed."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and re.search(OUT_OF_MEMORY, str(error)) is not None
    )


OS_ERROR_HINTS = {
    errno.ENOSPC: "The disk is full: make room and run again; resume a training with run.resume=true.",
    errno.EDQUOT: "The disk quota is used up: make room and run again; resume a training with run.resume=true.",
    errno.EROFS: "The disk is read-only: choose a folder on another, with hydra.run.dir=PATH.",
    errno.EACCES: "You may not write there: choose another folder with hydra.run.dir=PATH.",
    errno.EPERM: "You may not write there: choose another folder with hydra.run.dir=PATH.",
    errno.EIO: "The disk has failed: copy what is there, and resume elsewhere.",
    **dict.fromkeys(
        (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ELOOP),
        "Something else is in the place of a file or folder: move it away and run again, or choose another folder.",
    ),
}
"""Errors of the system that last until a user does something about them, and what; others may pass by themselves."""


class MetalearnError(Exception):
    """Base of the errors whose message says what is wrong and what to do.

    ``resumable``: the folder of the run, if it holds a checkpoint from which the same command resumes.
    """

    resumable: Path | None = None


class ConfigError(MetalearnError):
    """A configuration that cannot run; the message lists every error."""


class DataError(MetalearnError):
    """A data set that is missing, damaged or too small."""


class RunError(MetalearnError):
    """A run folder or file that cannot be used as requested, or training that cannot continue."""


class NonFiniteError(MetalearnError, ArithmeticError):
    """A NaN or infinite number that training cannot continue with.

    ``task``: index in the batch, if known; ``stop_requested``: whether a process of the run was asked to stop, too.
    """

    task: int | None = None
    stop_requested: bool = False

    def with_task_offset(self, first: int) -> NonFiniteError:
        """Return the same error for the whole batch, in which the chunk starts at task ``first``."""
        return self


class RemoteNonFiniteError(NonFiniteError):
    """A non-finite number in another process of the run."""

    def __init__(self) -> None:
        super().__init__("another process has found a loss or a gradient that is not finite; see its message.")


class NonFiniteGradientError(NonFiniteError):
    """A derivative that is NaN or infinite although the differentiated function is finite.

    Args:
        parameter: its name.
        value: the first entry that is not finite.
        task: index in the batch; ``None`` if the gradient of every task is finite.
        step: inner steps taken before the one that the gradient did not come back through; K for the query loss.
        what: name of the derivative.
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
        """Return the same error with ``first`` added to its task."""
        task = None if self.task is None else first + self.task
        return NonFiniteGradientError(self.parameter, value=self.value, task=task, step=self.step, what=self.what)


class NonFiniteLossError(NonFiniteError):
    """A loss (``kind``: support or query) that is NaN or infinite, so that it has no meaningful gradient.

    ``before``: the task's support loss one step earlier; ``None`` before the first.
    """

    def __init__(self, kind: str, *, task: int, step: int, value: float, before: float | None) -> None:
        self.kind, self.task, self.step, self.value, self.before = kind, task, step, value, before
        self.task: int
        zero = "log(0), 0/0 or sqrt(0) in the model or the loss"
        why = (
            f"no inner step was taken yet, so look at the task's inputs and targets, at the parameters, and for {zero}"
            if before is None
            else f"the support loss was {before:.4g} one step earlier; take a smaller inner.lr or fewer inner.steps, "
            f"or look for {zero}"
        )
        super().__init__(f"the {kind} loss of task {task} is {value} after {plural(step, 'inner step')}: {why}.")

    def with_task_offset(self, first: int) -> NonFiniteLossError:
        """Return the same error with ``first`` added to its task."""
        return NonFiniteLossError(
            self.kind, task=first + self.task, step=self.step, value=self.value, before=self.before
        )


class RunExistsError(RunError):
    """An output folder that already holds another run; ``can_resume`` says whether that is a training."""

    def __init__(self, folder: Path, file: str, *, can_resume: bool = False) -> None:
        resume = " The command that started it resumes it with run.resume=true." if can_resume else ""
        super().__init__(
            f"hydra.run.dir={folder} already holds a run (its {file}), which would be overwritten. Choose another "
            f"folder, or leave hydra.run.dir out for a new one.{resume}"
        )


class TerminatedError(RunError):
    """A process that a signal stopped, after saving its state."""

    def __init__(self, number: int) -> None:
        super().__init__(f"Stopped by {signal.Signals(number).name}.")
        self.signal = number
