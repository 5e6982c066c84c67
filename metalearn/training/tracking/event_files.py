"""Read a run's curves back from its event files."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from metalearn.core.errors import RunError
from metalearn.training.tracking.tags import present_tag

logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it logs every file read, and what a resumed run hides

EVENT_FILES = "events.out.tfevents.*"


def event_files(run_dir: Path) -> list[Path]:
    """Return a run's event files in the order in which TensorBoard reads them: their names go on with a second.

    Others' names, as of a copy that somebody has put aside, are not TensorBoard's.
    """
    found = (path for path in run_dir.glob(EVENT_FILES) if path.name.split(".")[3].isdecimal() and path.is_file())
    return sorted(found, key=lambda path: path.name)


class ScalarEvent(NamedTuple):
    """A point of a curve; ``wall_time`` in seconds since 1970."""

    step: int
    wall_time: float
    value: float


def read_scalars(run_dir: Path) -> dict[str, list[ScalarEvent]]:
    """Return every curve of a run by its present tag, with all points in the order of their steps.

    A resumed run has several event files; points after the meta-step that it resumed from are dropped. Sub-folders,
    such as those of evaluations, are other runs. Raise ``RunError`` if the folder holds no event file.
    """
    if not event_files(run_dir):
        raise RunError(
            f"{run_dir} holds no event file ({EVENT_FILES}): the run has not started, or was copied without it."
        )
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})  # 0: all; the default is 10,000 a tag
    events.Reload()
    return {
        present_tag(tag): _drop_superseded([ScalarEvent(e.step, e.wall_time, e.value) for e in events.Scalars(tag)])
        for tag in events.Tags()["scalars"]
    }


def _drop_superseded(points: list[ScalarEvent]) -> list[ScalarEvent]:
    """Drop points at and after the step of a later written one, as TensorBoard does: a test may be repeated."""
    kept: list[ScalarEvent] = []
    for point in points:
        while kept and kept[-1].step >= point.step:
            kept.pop()
        kept.append(point)
    return kept
