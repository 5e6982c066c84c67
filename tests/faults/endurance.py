"""What must not add up over a long training: memory, and the time that checkpoints take."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import psutil
import torch

from metalearn.training import loop as outer_loop
from metalearn.training.checkpoints import state_paths
from metalearn.training.session import TrainContext
from metalearn.training.state import TrainState
from tests.faults.processes import finished, output, start
from tests.faults.runs import RUN, SMALL, train
from tests.faults.suite import Row

_GROWTH = 0.01


def watch_memory(every: int) -> None:
    """Have this process note its resident set and its live tensors after every so many meta-steps."""
    step = outer_loop.meta_step

    def watched(session: TrainContext, state: TrainState) -> bool:
        asked = step(session, state)
        if state.iteration % every == 0:
            gc.collect()
            tensors = [o for o in gc.get_objects() if isinstance(o, torch.Tensor)]
            figures = {
                "iteration": state.iteration,
                "resident_mib": psutil.Process().memory_info().rss / 2**20,
                "tensors": len(tensors),
                "tensor_mib": sum(t.untyped_storage().nbytes() for t in tensors) / 2**20,
            }
            with Path("memory.jsonl").open("a") as file:
                file.write(json.dumps(figures) + "\n")
        return asked

    outer_loop.meta_step = watched


def train_for_long(i: int, folder: Path, shared: Path) -> dict[str, float]:
    """10,000 meta-steps of a small model, watched from the 2,000th; or 400, from the 200th."""
    steps = (10_000, 400)[i]
    every = steps // (10, 4)[i]
    more = [f"outer.iterations={steps}", f"eval.every={every}", "log.every=10", "run.checkpoint_every_s=5"]
    process = start([*SMALL, *more, f"hydra.run.dir={RUN}"], folder, before=watch_memory, given=(every,))
    assert finished(process, longest_s=900) == 0, output(folder)
    seen: list[dict[str, Any]] = [json.loads(line) for line in (folder / "memory.jsonl").read_text().splitlines()]
    first, *later = seen[1:]
    growth = {
        name: max(figures[name] for figures in later) / first[name] - 1
        for name in ("resident_mib", "tensors", "tensor_mib")
    }
    for name, grown in growth.items():
        assert grown <= _GROWTH or (i == 1 and name == "resident_mib"), f"{name} grew by {grown:.2%}: {seen}"
    return {f"{name}_growth": grown for name, grown in growth.items()} | {"meta_steps": steps}


def pay_for_checkpoints(i: int, folder: Path, shared: Path) -> dict[str, float]:
    """The default training at a sixth of its length, with its default interval; or the small one with a long one."""
    if i == 1:  # nothing is saved but at validations, and the test tells by the meta-steps that were
        run_dir = train(folder, "run.checkpoint_every_s=1000")
        assert [p.stem for p in state_paths(run_dir)] == ["state-00000024", "state-00000016"]
        return {}
    more = ["data=glyphs", "outer.iterations=1200", "eval.episodes=100", f"hydra.run.dir={RUN}"]
    assert finished(start(more, folder), longest_s=900) == 0, output(folder)
    metrics = json.loads((folder / RUN / "metrics.json").read_text())
    share = metrics["time.checkpoint_s"] / metrics["time.training_s"]
    return {"share_of_training_time": share, "checkpoint_s": metrics["time.checkpoint_s"]}


MEMORY = Row(
    "memory",
    "10,000 meta-steps of a small model",
    "no growth in memory (resident set and live tensors) beyond 1%",
    tries=1,
    attempt=train_for_long,
    short=(1,),
    seconds=150,
)
COST = Row(
    "checkpoint_cost",
    "checkpoints at the default interval",
    "under 1% of the training time",
    tries=1,
    attempt=pay_for_checkpoints,
    short=(1,),
    seconds=150,
    limits={"share_of_training_time": 0.01},
)
