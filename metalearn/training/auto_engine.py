"""``inner.engine=auto``: measure a meta-step, and take the fastest engine and task chunk that fit into memory.

Peak memory grows with the tasks in a pass, peak(c) = a + b c, so two small passes tell how many tasks fit. Those that
fit are then timed on the whole batch, and the fastest one's memory is measured once more.

``choose_kernels`` measures as well whether a GPU is faster with the stacked kernels.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from metalearn.core.errors import RunError, is_out_of_memory
from metalearn.core.params import relative_error
from metalearn.core.profiling.memory import MIB, MemoryLimitError, peak_bytes
from metalearn.core.profiling.timing import seconds
from metalearn.core.types import Episodes, Forward, Loss, Params
from metalearn.derivatives import available_memory
from metalearn.inner import InnerLoop
from metalearn.inner.diagnostics import defer_loss_checks
from metalearn.metagrad import ENGINES, Engine, meta_gradient
from metalearn.metagrad.task_chunks import tasks_per_pass
from metalearn.training.experiment import Experiment, with_config
from metalearn.training.runtime.precision import ENGINE_BOUND

log = logging.getLogger(__name__)

_FRACTION_OF_FREE = 0.8
_CACHE_FRIENDLY = (4, 8)  # tasks in a pass: small chunks are sometimes faster on CPUs
_KERNEL_ADVANTAGE = 1.05  # times that the kernels must be faster, as they round differently
_WARM_UPS, _REPEATS = 3, 3  # the first two calls compare a CUDA graph with the eager result


@dataclass(frozen=True)
class MetaStepProblem:
    """The inputs of a meta-step; ``engine`` if the algorithm has its own meta-gradient."""

    forward: Forward
    params: Params
    episodes: Episodes
    loss: Loss = cross_entropy
    engine: Engine | None = None

    @property
    def device(self) -> torch.device:
        """Of the episodes."""
        return self.episodes.query_x.device

    def tasks_per_pass(self, inner: InnerLoop) -> int:
        """Return how many tasks a meta-gradient takes at a time."""
        return tasks_per_pass(self.forward, self.params, self.episodes, inner, engine=self.engine)

    def step(self, inner: InnerLoop) -> None:
        """Compute one meta-gradient and discard it; on a GPU without waits for checks, as a training does."""
        with defer_loss_checks() if self.device.type == "cuda" else nullcontext():
            meta_gradient(self.forward, self.params, self.episodes, inner, loss=self.loss, engine=self.engine)

    def peak(self, inner: InnerLoop, limit: int) -> int:
        """Return the peak bytes of one meta-gradient."""
        return peak_bytes(lambda: self.step(inner), self.device, limit=limit)

    def seconds(self, inner: InnerLoop) -> float:
        """Return the seconds of one meta-gradient."""
        return seconds(lambda: self.step(inner), self.device)


def resolve_auto_engine(experiment: Experiment) -> Experiment:
    """Replace ``inner.engine=auto`` by the engine that it stands for, also in the configuration."""
    if experiment.inner.engine != "auto":
        return experiment
    config = experiment.config
    problem = first_meta_step(experiment)
    with experiment.precision():
        inner = choose_engine(problem, experiment.algorithm.peak_memory_inner, limit_mib=config.run.memory_limit_mib)
    resolved: dict[str, Any] = {"engine": inner.engine, "task_chunk": inner.task_chunk}
    resolved["checkpoint_every"] = inner.checkpoint_every
    return with_config(experiment, replace(config, inner=replace(config.inner, **resolved)))


def first_meta_step(experiment: Experiment) -> MetaStepProblem:
    """Return the inputs of a run's first meta-step."""
    batch = experiment.train.batch(0, experiment.config.task.meta_batch)
    return MetaStepProblem(
        experiment.forward, experiment.theta, batch, experiment.metric.loss, experiment.algorithm.engine
    )


def choose_engine(problem: MetaStepProblem, inner: InnerLoop, *, limit_mib: float | None) -> InnerLoop:
    """Return the inner loop with the fastest engine, task chunk and checkpoint interval that fit into ``limit_mib``.

    A ``task_chunk`` or ``checkpoint_every`` that is set is kept. Without a limit, 80% of the free memory is taken.
    Raise ``RunError`` if nothing fits, naming the memory that the smallest setting takes.
    """
    free = _FRACTION_OF_FREE * available_memory(problem.device)
    limit = int(free if limit_mib is None else min(limit_mib * MIB, free))
    log.info("inner.engine=auto measures meta-steps with every engine; this takes some seconds")
    with torch.random.fork_rng(devices=[problem.device] if problem.device.type == "cuda" else []):
        fitting = [chunked for one in _variants(inner) for chunked in _chunks(problem, one, limit)]
        if not fitting:
            raise RunError(_does_not_fit_error(problem, inner, limit))
        times = {one: best_s for one in fitting if (best_s := _best_time(problem, one)) is not None}
        for best in sorted(times, key=lambda one: times[one]):
            try:
                peak = problem.peak(best, limit)
            except MemoryLimitError:
                continue  # memory was not quite linear in tasks
            log.info(
                "inner.engine=auto chose %s, task_chunk %d, checkpoint_every %d: %.0f ms and %.3g of %.4g MiB a "
                "meta-step (of %d that fit)",
                *(best.engine, best.task_chunk, best.checkpoint_every),
                *(1000 * times[best], peak / MIB, limit / MIB, len(fitting)),
            )
            return best
    raise RunError(_does_not_fit_error(problem, inner, limit))


def _best_time(problem: MetaStepProblem, inner: InnerLoop) -> float | None:
    """Return the seconds of the faster of two meta-gradients after a warm-up; ``None`` if memory runs out."""
    try:
        problem.step(inner)
        return min(problem.seconds(inner), problem.seconds(inner))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None


def _variants(inner: InnerLoop) -> Iterator[InnerLoop]:
    interval = math.isqrt(inner.steps)
    for engine in ENGINES if inner.second_order else ("unroll",):  # in first order all engines are the same
        yield replace(inner, engine=engine)
        if engine != "unroll" and inner.checkpoint_every == 1 and interval > 1:
            yield replace(inner, engine=engine, checkpoint_every=interval)


def _chunks(problem: MetaStepProblem, inner: InnerLoop, limit: int) -> list[InnerLoop]:
    """Return the inner loop with the largest task chunk that fits, and with smaller ones that may be faster."""
    tasks = problem.episodes.tasks
    most = min(tasks, inner.task_chunk or tasks)
    totals = 2 * sum(p.numel() * p.element_size() for p in problem.params.values())  # a sum and a chunk's
    sizes: set[int] = set()
    try:
        one = estimate_peak(problem, inner, 1, limit)
        sizes.add(1)
        slope = max(estimate_peak(problem, inner, min(2, most), limit) - one, 1)
        largest = 1 + max(0, limit - one - totals) // slope
        sizes = {min(largest, most)}
        if inner.task_chunk is None:
            fast = problem.tasks_per_pass(inner)
            sizes |= {size for size in (fast, *_CACHE_FRIENDLY) if size < min(largest, most)}
    except MemoryLimitError:
        pass  # nothing larger fits than what was found
    return [replace(inner, task_chunk=size) for size in sorted(sizes)]


def estimate_peak(problem: MetaStepProblem, inner: InnerLoop, tasks: int, limit: int = 2**62) -> int:
    """Return the peak bytes of a meta-gradient of the first ``tasks`` tasks, all at once."""
    few = replace(problem, episodes=problem.episodes.split(tasks)[0])
    return few.peak(replace(inner, task_chunk=tasks), limit)


def _does_not_fit_error(problem: MetaStepProblem, inner: InnerLoop, limit: int) -> str:
    """Return the message, with the memory of one task at a time: of two tasks, because the second adds to a sum."""
    two = replace(problem, episodes=problem.episodes.split(2)[0])
    sparse = replace(inner, task_chunk=1, checkpoint_every=max(1, math.isqrt(inner.steps)))
    try:
        needed = min(two.peak(replace(sparse, engine=engine), 2**62) for engine in ENGINES)
        least = f"one task at a time takes at least {1.01 * needed / MIB:#.3g} MiB"
    except MemoryLimitError:
        least = "not even one task at a time fits into this device's memory"
    return (
        f"inner.engine=auto: no engine fits into {limit / MIB:#.3g} MiB; {least}. Raise run.memory_limit_mib, or take "
        "fewer examples (task.ways, task.shots, task.queries), a narrower model or inner.second_order=false."
    )


def choose_kernels(experiment: Experiment, episodes: Episodes) -> Experiment:
    """Return the experiment with the stacked kernels if a GPU computes its meta-gradient faster with them.

    Their gradient of ``episodes`` must be within ``ENGINE_BOUND`` of the one without. A resumed run measures again.
    Without a GPU nothing is measured, nor with ``run.deterministic``, which torch's layers stay with.
    """
    config = experiment.config
    if experiment.device.type != "cuda" or config.run.deterministic or config.algorithm.backend != "metalearn":
        return experiment
    try:
        with experiment.precision(), torch.random.fork_rng(devices=[experiment.device]), defer_loss_checks():
            with_kernels, without = (_gradient(experiment, episodes, kernels=kernels) for kernels in (True, False))
            error = relative_error(with_kernels, without)
            del with_kernels, without
            kernels_s, torch_s = (_seconds_of_run(experiment, episodes, kernels=kernels) for kernels in (True, False))
    except RuntimeError as raised:  # of memory as well: torch's layers are what every operation is known to work with
        log.info("Stacked kernels are not used on this GPU: %.300s", raised)
        return experiment
    chosen = error <= ENGINE_BOUND and torch_s > _KERNEL_ADVANTAGE * kernels_s
    log.info(
        "Stacked kernels are %s: a meta-gradient takes %.3g ms with them and %.3g ms without, and differs by %.2g",
        *("used" if chosen else "not used", 1000 * kernels_s, 1000 * torch_s, error),
    )
    return replace(experiment, kernels_on_gpus=chosen)


def _gradient(experiment: Experiment, episodes: Episodes, *, kernels: bool) -> Params:
    return replace(experiment, kernels_on_gpus=kernels).meta_gradient_eager(experiment.theta, episodes, 0).grads


def _seconds_of_run(experiment: Experiment, episodes: Episodes, *, kernels: bool) -> float:
    """Return the seconds of a meta-gradient as the run computes it: with ``run.cuda_graph``, of a replay."""
    one = replace(experiment, kernels_on_gpus=kernels)  # with a graph of its own
    times = [
        seconds(lambda: one.meta_gradient(one.theta, episodes, 0), one.device) for _ in range(_WARM_UPS + _REPEATS)
    ]
    return min(times[_WARM_UPS:])
