"""NaN and infinity in a loss or a gradient stop a training before the step, and leave the checkpoint before."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from metalearn.config.compose import compose, to_dataclass
from metalearn.config.schema import TrainConfig
from metalearn.core.errors import NonFiniteLossError, RunError
from metalearn.core.types import Episodes, Forward, Params
from metalearn.training import loop as outer_loop
from metalearn.training import trainer as training
from metalearn.training.experiment import Experiment, build_experiment
from metalearn.training.failures import replay_episode
from metalearn.training.runtime.distributed import DistributedContext
from metalearn.training.step import local_tasks
from tests.faults.cases import cases
from tests.faults.processes import load_state
from tests.faults.runs import SMALL, tensors_to_bytes

STEP, TASK = 13, 2  # meta-steps before the fault, and the task of the batch that has it
MARKER = 9.0  # a pixel value that no image has


def with_nonfinite_gradient(forward: Forward, *, infinite: bool) -> Forward:
    """Keep the values; make the gradient infinite or NaN for images with the marker."""

    def changed(params: Params, x: Tensor) -> Tensor:
        bias = next(iter(params.values())).sum()
        zero = bias - bias.detach()
        u = zero if infinite else zero.pow(2)
        marked = x.amax() == MARKER
        return forward(params, x) + torch.where(marked, torch.where(marked, u, 1.0).sqrt(), 0.0)

    return changed


def inject(kind: str, value: float, patch: pytest.MonkeyPatch) -> None:
    def build_changed(config: TrainConfig) -> Experiment:
        experiment = build_experiment(config)
        forward = with_nonfinite_gradient(experiment.forward, infinite=math.isinf(value))
        return dataclasses.replace(experiment, forward=forward)

    def changed_tasks(experiment: Experiment, iteration: int, ranks: DistributedContext) -> Episodes:
        episodes = local_tasks(experiment, iteration, ranks)
        if iteration == STEP:
            x = episodes.support_x if kind == "support" else episodes.query_x
            x[TASK, 0] = MARKER if kind == "gradient" else value
        return episodes

    patch.setattr(training, "build_experiment", build_changed)
    patch.setattr(outer_loop, "local_tasks", changed_tasks)


def run(folder: Path, *more: str) -> None:
    training.train(to_dataclass(compose("train", [*SMALL, *more]), TrainConfig), folder)


PLACES = {"support": "after 0 inner steps", "query": "after 1 inner step", "gradient": "back to inner step 1"}


@pytest.mark.fault(
    "NaN or Inf in support loss, query loss, gradient", "stopped before the step, named, last checkpoint intact"
)
@pytest.mark.parametrize("fault", cases(itertools.product(PLACES, (math.nan, math.inf)), quick=[0, 3, 4]))
def test_nonfinite_number(fault: tuple[str, float], tmp_path: Path, uninterrupted_run: Path) -> None:
    kind, value = fault
    with pytest.MonkeyPatch.context() as patch:
        inject(kind, value, patch)
        with pytest.raises(RunError) as raised:
            run(tmp_path / "run")
    message = str(raised.value)
    named = (f"meta-step {STEP + 1}:", f"of task {TASK} is", PLACES[kind], "smaller inner.lr", "run.on_nonfinite=skip")
    for words in (*named, f"checkpoint of meta-step {STEP} is kept"):
        assert words in message, message
    state = load_state(tmp_path / "run")["state"]
    assert state["iteration"] == STEP
    assert all(torch.isfinite(p).all() for p in state["params"].values())
    (episode,) = (tmp_path / "run" / "nonfinite").glob("*.pt")
    if kind != "gradient":  # which only the changed model has
        with pytest.raises(NonFiniteLossError, match=f"{kind} loss of task 0"):
            replay_episode(episode)
    run(tmp_path / "run", "run.resume=true")  # without the fault it ends as the uninterrupted run
    ours, theirs = load_state(tmp_path / "run")["state"], load_state(uninterrupted_run)["state"]
    for name in ("params", "optimizer", "best"):
        assert tensors_to_bytes(ours[name]) == tensors_to_bytes(theirs[name]), name
