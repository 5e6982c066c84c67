"""A run's curves, read back from its event files."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from metalearn.core.errors import RunError

logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it announces every file read, and what a resumed run hides

EVENT_FILES = "events.out.tfevents.*"


class ScalarEvent(NamedTuple):
    """One value of a curve; ``wall_time`` in seconds since 1970."""

    step: int
    wall_time: float
    value: float


def read_scalars(run_dir: Path) -> dict[str, list[ScalarEvent]]:
    """Every curve of a run by its tag, whole, and in the order of its steps.

    A resumed run has several event files. What the earlier wrote after the meta-step from which the run went on counts
    no more. Folders below, such as those of evaluations, are runs of their own.

    Raises:
        RunError: if the folder holds no event file.
    """
    if not any(run_dir.glob(EVENT_FILES)):
        raise RunError(
            f"{run_dir} holds no event file ({EVENT_FILES}): the run has not begun, or was copied without it."
        )
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})  # 0: all; the default is 10,000 a tag
    events.Reload()
    return {
        tag: _without_repeats([ScalarEvent(e.step, e.wall_time, e.value) for e in events.Scalars(tag)])
        for tag in events.Tags()["scalars"]
    }


def _without_repeats(points: list[ScalarEvent]) -> list[ScalarEvent]:
    """A later point replaces those at its step and beyond, as in TensorBoard: a final test may be taken twice."""
    kept: list[ScalarEvent] = []
    for point in points:
        while kept and kept[-1].step >= point.step:
            kept.pop()
        kept.append(point)
    return kept
