"""A small training for tests that cause faults, and comparisons of its results."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from metalearn.core import serialization as files
from metalearn.training.checkpoints import best_path
from metalearn.training.tracking.event_files import read_scalars
from tests.commands.process import words
from tests.faults.processes import load_state, read_output, start_training, wait_for_checkpoint, wait_for_exit

STEPS = 24
SMALL = words(f"""
data=glyphs data.classes=50 model=mlp model.hidden=[8] model.batch_norm=false task.meta_batch=3 inner.eval_steps=1
outer.iterations={STEPS} eval.every=8 eval.validation_episodes=4 eval.episodes=4 log.every=3 log.images=false
run.device=cpu run.checkpoint_every_s=0
""")
RUN = "run"
SMALL_RUN = [*SMALL, f"hydra.run.dir={RUN}"]


def train(folder: Path, *more: str) -> Path:
    """Train to the end, or resume and do so; return the run's folder."""
    status = wait_for_exit(start_training([*SMALL_RUN, *more], folder))
    assert status == 0, f"exit code {status}: {read_output(folder)}"
    return folder / RUN


def resume(folder: Path, *more: str) -> Path:
    return train(folder, "run.resume=auto", *more)


def train_and_kill(folder: Path, *, after: int) -> Path:
    """Train, kill the process once it has saved its state after so many meta-steps; return the run's folder."""
    process = start_training(SMALL_RUN, folder)
    wait_for_checkpoint(folder / RUN, after, process)
    process.kill()
    assert wait_for_exit(process) == -signal.SIGKILL
    return folder / RUN


def tensors_to_bytes(content: Any) -> Any:
    """Replace tensors in nested containers by their bytes, so that ``==`` compares them."""
    if isinstance(content, dict):
        return {key: tensors_to_bytes(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [tensors_to_bytes(value) for value in content]
    return content.numpy().tobytes() if isinstance(content, Tensor) else content


def metrics_without_times(run_dir: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((run_dir / "metrics.json").read_text())
    return {name: value for name, value in metrics.items() if not name.startswith("time.")}


def assert_runs_equal(run_dir: Path, other: Path) -> None:
    """Check that parameters, optimiser, random states, best parameters, metrics and curves are equal, bit by bit."""
    ours, theirs = load_state(run_dir)["state"], load_state(other)["state"]
    for name in theirs:
        assert tensors_to_bytes(ours[name]) == tensors_to_bytes(theirs[name]), f"{name} differs"
    best = files.load_checked(best_path(run_dir))
    assert tensors_to_bytes([best["iteration"], best["validation_accuracy"], best["params"]]) == tensors_to_bytes(
        ours["best"]
    )
    assert metrics_without_times(run_dir) == metrics_without_times(other)
    assert (run_dir / "test_tasks.json").read_text() == (other / "test_tasks.json").read_text()
    assert_steps_increase(run_dir)
    curves, expected = read_scalars(run_dir), read_scalars(other)
    for tag in (tag for tag in expected if not tag.endswith(("_ms", "_s"))):
        assert [(p.step, p.value) for p in curves[tag]] == [(p.step, p.value) for p in expected[tag]], tag


def assert_steps_increase(run_dir: Path) -> None:
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    for tag in events.Tags()["scalars"]:
        steps = [point.step for point in events.Scalars(tag)]
        assert steps == sorted(set(steps)), f"{tag}: {steps}"
