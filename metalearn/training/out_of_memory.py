"""What a run needs, and which keys lower it, where memory has run out."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from metalearn.core.errors import OUT_OF_MEMORY, RunError
from metalearn.core.profiling.memory import MIB
from metalearn.derivatives import available_memory
from metalearn.inner import InnerLoop
from metalearn.training.auto_engine import estimate_peak, first_meta_step
from metalearn.training.experiment import Experiment


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's or a CPU's allocator had no more to give; the latter has no class of its own in torch."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and re.search(OUT_OF_MEMORY, str(error)) is not None


@contextmanager
def explain_out_of_memory(experiment: Experiment, *, processes: int = 1) -> Iterator[None]:
    """Torch's error becomes one that says what a meta-step takes, and which keys lower it.

    Args:
        experiment: what is computed with.
        processes: how many share a batch's tasks.

    Raises:
        RunError: where memory runs out.
    """
    reason = ""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    if reason:  # out here, as the error's trace would keep the activations that did not fit
        raise RunError(_message(experiment, reason, processes))


def _message(experiment: Experiment, reason: str, processes: int) -> str:
    config = experiment.config
    share = math.ceil(config.task.meta_batch / processes)
    tasks = min(share, config.inner.task_chunk or share)
    now = _estimate(experiment, experiment.algorithm.peak_memory_inner, tasks)
    needs = f" A meta-step takes about {now:.0f} MiB as it is set" if now else " As it is set, a meta-step does not fit"
    lines = [
        f"Out of memory ({reason}).{needs} (inner.engine={config.inner.engine}, {tasks} of {share} "
        f"tasks at a time), and {available_memory(experiment.device) / MIB:.0f} MiB are free now. "
        "The same gradient takes less by these keys:"
    ]
    thriftier = [
        ("inner.engine=adjoint", replace(experiment.algorithm.peak_memory_inner, engine="adjoint"), tasks),
        ("inner.task_chunk=1", experiment.algorithm.peak_memory_inner, 1),
        (
            "inner.engine=adjoint inner.task_chunk=1",
            replace(experiment.algorithm.peak_memory_inner, engine="adjoint"),
            1,
        ),
    ]
    for keys, inner, at_a_time in thriftier:
        if (inner.engine, at_a_time) != (experiment.algorithm.peak_memory_inner.engine, tasks):
            mib = _estimate(experiment, inner, at_a_time)
            lines.append(f"  {keys}" + (f"   about {mib:.0f} MiB" if mib else ""))
    lines += [
        "  inner.engine=auto   measures, and takes the fastest that fits",
        "  inner.checkpoint_every=s   near the square root of inner.steps, where those are many",
        "Smaller tasks take less as well (task.ways, task.shots, task.queries), and so does a narrower model.",
    ]
    return "\n".join(lines)


def _estimate(experiment: Experiment, inner: InnerLoop, tasks: int) -> float | None:
    """MiB of one meta-step's tensors, from passes of one and two tasks; ``None`` if even these do not fit.

    peak(c) = a + b c
    """
    problem = first_meta_step(experiment)
    try:
        one = estimate_peak(problem, inner, 1)
        if tasks == 1:
            return one / MIB
        return (one + (tasks - 1) * (estimate_peak(problem, inner, 2) - one)) / MIB
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None
