"""What the engines are measured on, and what a measurement is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TaskSpec:
    """Tasks and a network.

    Args:
        name: for files.
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
        """In words."""
        return (
            f"{self.ways}-way {self.shots}-shot, {self.queries} quer{'y' if self.queries == 1 else 'ies'}, "
            f"{self.tasks} tasks, conv4 with {self.width} filters"
        )


@dataclass(frozen=True)
class EngineBenchmark(TaskSpec):
    """What the engines are measured on.

    Args:
        steps: numbers K of inner steps whose memory is measured.
        timed: those that are timed as well.
    """

    steps: tuple[int, ...]
    timed: tuple[int, ...]


SETTINGS = (
    EngineBenchmark("20way_1shot", 20, 1, 1, 16, 64, (1, 5, 10, 20, 50), (1, 10)),
    EngineBenchmark("5way_1shot", 5, 1, 15, 16, 64, (1, 5, 10), (1, 10)),
    EngineBenchmark("5way_5shot", 5, 5, 15, 16, 64, (1, 5, 10), (1, 10)),
    EngineBenchmark("20way_1shot_wide", 20, 1, 1, 4, 256, (1, 10, 50), (10,)),
)


@dataclass(frozen=True)
class EngineCost:
    """One engine's cost at one K.

    Args:
        engine: one of ``ENGINES``; in first order they are all the same.
        second_order: or first order.
        task_chunk: tasks in a pass; ``None`` is all.
        snapshot_every: the distance of the fast weights that are kept.
        steps: K.
        peak_mib: of one meta-gradient; ``None`` where it went over the limit.
        median_ms: ``None`` where it was not timed.
        quartiles_ms: of the rounds.
        ratio_to_unroll: median over rounds of the time over that of ``unroll`` on all tasks.
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
        """As it stands in tables and legends."""
        words = [self.engine if self.second_order else "first order"]
        words += [f"{self.task_chunk} task{'s' if self.task_chunk > 1 else ''} at a time"] if self.task_chunk else []
        words += ["sparse snapshots"] if self.snapshot_every > 1 else []
        return ", ".join(words)
