"""Long trainings: memory does not grow, and checkpoints take next to no time."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from metalearn.core.types import Episodes
from metalearn.training import loop as outer_loop
from metalearn.training.checkpoints import state_paths
from metalearn.training.loop import TrainContext
from metalearn.training.state import TrainState
from tests.faults.processes import read_output, start_training, wait_for_exit
from tests.faults.runs import RUN, SMALL_RUN, train


def record_memory(every: int) -> None:
    """Make this process write its resident set and its live tensors to a file after every so many meta-steps."""
    log_step = outer_loop.log_step

    def log_step_and_memory(context: TrainContext, state: TrainState, episodes: Episodes, lr: float) -> None:
        log_step(context, state, episodes, lr)
        if state.iteration % every == 0:
            gc.collect()
            tensors = [o for o in gc.get_objects() if isinstance(o, torch.Tensor)]
            usage = {
                "iteration": state.iteration,
                "resident_mib": psutil.Process().memory_info().rss / 2**20,
                "tensors": len(tensors),
                "tensor_mib": sum(t.untyped_storage().nbytes() for t in tensors) / 2**20,
            }
            with Path("memory.jsonl").open("a") as file:
                file.write(json.dumps(usage) + "\n")

    outer_loop.log_step = log_step_and_memory


def growth_of_memory(folder: Path, *, steps: int, every: int) -> dict[str, float]:
    """Train for so many meta-steps and return the fraction by which memory grew after the second measurement."""
    more = [f"outer.iterations={steps}", f"eval.every={every}", "log.every=10", "run.checkpoint_every_s=5"]
    process = start_training([*SMALL_RUN, *more], folder, before=record_memory, args=(every,))
    assert wait_for_exit(process, timeout_s=900) == 0, read_output(folder)
    usage: list[dict[str, Any]] = [json.loads(line) for line in (folder / "memory.jsonl").read_text().splitlines()]
    first, *later = usage[1:]
    return {
        f"{name}_growth": max(row[name] for row in later) / first[name] - 1
        for name in ("resident_mib", "tensors", "tensor_mib")
    }


def test_no_tensors_are_left_after_400_meta_steps(tmp_path: Path) -> None:
    growth = growth_of_memory(tmp_path, steps=400, every=100)
    assert growth["tensors_growth"] <= 0.01, growth
    assert growth["tensor_mib_growth"] <= 0.01, growth


@pytest.mark.slow
@pytest.mark.fault(
    "10,000 meta-steps of a small model", "no growth in memory (resident set and live tensors) beyond 1%"
)
def test_memory_growth(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    growth = growth_of_memory(tmp_path, steps=10_000, every=1000)
    for name, value in growth.items():
        record_property(name, value)
    record_property("meta_steps", 10_000)
    assert max(growth.values()) <= 0.01, growth


def test_long_interval_saves_at_validations_only(tmp_path: Path) -> None:
    run_dir = train(tmp_path, "run.checkpoint_every_s=1000")
    assert [p.stem for p in state_paths(run_dir)] == ["state-00000024", "state-00000016"]


@pytest.mark.slow
@pytest.mark.fault("checkpoints at the default interval", "under 1% of the training time")
def test_checkpoint_cost(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    # The default training at a sixth of its length.
    more = ["data=glyphs", "outer.iterations=1200", "eval.episodes=100", f"hydra.run.dir={RUN}"]
    assert wait_for_exit(start_training(more, tmp_path), timeout_s=900) == 0, read_output(tmp_path)
    metrics = json.loads((tmp_path / RUN / "metrics.json").read_text())
    share = metrics["time.checkpoint_s"] / metrics["time.training_s"]
    record_property("share_of_training_time", share)
    record_property("checkpoint_s", metrics["time.checkpoint_s"])
    assert share < 0.01
