"""Tasks and networks on which the engines are measured, and the result of a measurement. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TaskSpec:
    """Tasks and a network.

    Args:
        name: identifier, also in file names.
        ways: N.
        shots: support examples per class.
        queries: query examples per class.
        tasks: T.
        width: filters of conv4.
    """

    name: str
    ways: int
    shots: int
    queries: int
    tasks: int
    width: int

    @property
    def title(self) -> str:
        """Description for tables and plots."""
        tasks = describe_tasks(self.ways, self.shots, self.queries, self.tasks)
        return f"{tasks}, conv4 with {self.width} filters"


def describe_tasks(ways: int, shots: int, queries: int, tasks: int) -> str:
    """Return, for example, ``5-way 1-shot, 15 queries, 16 tasks``."""
    return f"{ways}-way {shots}-shot, {queries} quer{'y' if queries == 1 else 'ies'}, {tasks} tasks"


@dataclass(frozen=True)
class EngineBenchmark(TaskSpec):
    """Tasks, a network, and numbers of inner steps at which the engines are measured.

    Args:
        steps: numbers K of inner steps at which memory is measured.
        timed: those at which time is measured as well.
    """

    steps: tuple[int, ...]
    timed: tuple[int, ...]


ENGINE_SETTINGS = (
    EngineBenchmark("20way_1shot", 20, 1, 1, 16, 64, (1, 5, 10, 20, 50), (1, 10)),
    EngineBenchmark("5way_1shot", 5, 1, 15, 16, 64, (1, 5, 10), (1, 10)),
    EngineBenchmark("5way_5shot", 5, 5, 15, 16, 64, (1, 5, 10), (1, 10)),
    EngineBenchmark("20way_1shot_wide", 20, 1, 1, 4, 256, (1, 10, 50), (10,)),
)


@dataclass(frozen=True)
class EngineCost:
    """Memory and time of one engine at one K.

    Args:
        engine: one of ``ENGINES``; in first order they are all the same.
        second_order: the order of the meta-gradient.
        task_chunk: tasks in a pass; ``None`` is all.
        snapshot_every: inner steps between two snapshots of the fast weights.
        steps: K.
        peak_mib: peak memory of one meta-gradient; ``None`` if it exceeded the limit.
        median_ms: median time over rounds; ``None`` if it was not timed.
        quartiles_ms: lower and upper quartile over rounds.
        ratio_to_unroll: median over rounds of the time divided by that of ``unroll`` on all tasks.
    """

    engine: str
    second_order: bool
    task_chunk: int | None
    snapshot_every: int
    steps: int
    peak_mib: float | None
    median_ms: float | None = None
    quartiles_ms: tuple[float, float] | None = None
    ratio_to_unroll: float | None = None

    @property
    def name(self) -> str:
        """Label in tables and legends."""
        words = [self.engine if self.second_order else "first order"]
        words += [f"{self.task_chunk} task{'s' if self.task_chunk > 1 else ''} at a time"] if self.task_chunk else []
        words += ["sparse snapshots"] if self.snapshot_every > 1 else []
        return ", ".join(words)
