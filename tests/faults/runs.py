"""A small training that faults are brought about in, and what an uninterrupted one of it ends with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from metalearn.core import serialization as files
from metalearn.training.checkpoints import best_path
from metalearn.training.tracking.event_files import read_scalars
from tests.faults.processes import finished, output, start, state_of

STEPS = 24
SMALL = [
    "data=glyphs",
    "data.classes=50",
    "model=mlp",
    "model.hidden=[8]",
    "model.batch_norm=false",
    "task.meta_batch=3",
    "inner.eval_steps=1",
    f"outer.iterations={STEPS}",
    "eval.every=8",
    "eval.validation_episodes=4",
    "eval.episodes=4",
    "log.every=3",
    "log.images=false",
    "run.device=cpu",
    "run.checkpoint_every_s=0",
]
RUN = "run"


def train(folder: Path, *more: str) -> Path:
    """A training, or the rest of one, to its end; returns the run's folder."""
    status = finished(start([*SMALL, f"hydra.run.dir={RUN}", *more], folder))
    assert status == 0, f"exit code {status}: {output(folder)}"
    return folder / RUN


def resume(folder: Path, *more: str) -> Path:
    """The rest of an interrupted training."""
    return train(folder, "run.resume=auto", *more)


def whole(shared: Path) -> Path:
    """The uninterrupted run, made once."""
    folder = shared / "whole"
    if not (folder / RUN / "metrics.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        train(folder)
    return folder / RUN


def bits(content: Any) -> Any:
    """Nested containers with their tensors as bytes, so that they can be compared."""
    if isinstance(content, dict):
        return {key: bits(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [bits(value) for value in content]
    return content.numpy().tobytes() if isinstance(content, Tensor) else content


def timeless(run_dir: Path) -> dict[str, Any]:
    """A run's figures but for those that count seconds."""
    metrics: dict[str, Any] = json.loads((run_dir / "metrics.json").read_text())
    return {name: value for name, value in metrics.items() if not name.startswith("time.")}


def assert_same(run_dir: Path, other: Path) -> None:
    """Parameters, optimiser, random states, best parameters, figures and curves are equal, bit by bit."""
    ours, theirs = state_of(run_dir)["state"], state_of(other)["state"]
    for name in theirs:
        assert bits(ours[name]) == bits(theirs[name]), f"{name} differs"
    best = files.load_checked(best_path(run_dir))
    assert bits([best["iteration"], best["validation_accuracy"], best["params"]]) == bits(ours["best"])
    assert timeless(run_dir) == timeless(other)
    assert (run_dir / "test_tasks.json").read_text() == (other / "test_tasks.json").read_text()
    assert_curves(run_dir)
    curves, expected = read_scalars(run_dir), read_scalars(other)
    for tag in (tag for tag in expected if not tag.startswith("time/")):
        assert [(p.step, p.value) for p in curves[tag]] == [(p.step, p.value) for p in expected[tag]], tag


def assert_curves(run_dir: Path) -> None:
    """As TensorBoard reads them, steps grow and none is doubled."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    for tag in events.Tags()["scalars"]:
        steps = [point.step for point in events.Scalars(tag)]
        assert steps == sorted(set(steps)), f"{tag}: {steps}"
