"""Reading curves back: every point once, and none of another run."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from metalearn.core.errors import RunError
from metalearn.training.tracking.event_files import EVENT_FILES, ScalarEvent, read_scalars
from metalearn.training.tracking.tensorboard import TensorBoardLogger


def test_read_scalars_returns_every_point(tmp_path: Path) -> None:
    before = time.time()
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(12_000):  # TensorBoard's reader keeps 10,000 unless told otherwise
            writer.add_scalar("a", step / 4, step)
        writer.add_scalar("b/c", -1.5, 7)
    scalars = read_scalars(tmp_path)
    assert set(scalars) == {"a", "b/c"}
    assert [(p.step, p.value) for p in scalars["a"]] == [(step, step / 4) for step in range(12_000)]
    (point,) = scalars["b/c"]
    assert point == ScalarEvent(7, point.wall_time, -1.5)
    assert before - 1 <= point.wall_time <= time.time() + 1


def test_read_scalars_ignores_sub_folders(tmp_path: Path) -> None:
    for folder, value in ((tmp_path, 1.0), (tmp_path / "evaluations" / "a", 2.0)):
        with TensorBoardLogger(folder, config="") as tracker:
            tracker.log_scalars({"x": value}, 3)
    assert [(p.step, p.value) for p in read_scalars(tmp_path)["x"]] == [(3, 1.0)]


def test_repeated_test_counts_once(tmp_path: Path) -> None:
    for resumed_at, values in ((None, (0.2, 0.7, 0.8)), (40, (0.3, 0.6, 0.9))):
        with TensorBoardLogger(tmp_path, config="", resumed_at=resumed_at) as tracker:
            for step, value in enumerate(values):
                tracker.log_scalars({"test/accuracy_by_inner_step": value}, step)
    assert len(list(tmp_path.glob(EVENT_FILES))) == 2
    points = read_scalars(tmp_path)["test/accuracy_by_inner_step"]
    assert [p.step for p in points] == [0, 1, 2]
    assert [p.value for p in points] == pytest.approx([0.3, 0.6, 0.9])


def test_read_scalars_raises_without_event_files(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    with pytest.raises(RunError, match=rf"{tmp_path} holds no event file"):
        read_scalars(tmp_path)
