"""NaN and infinity where a loss or a gradient should be."""

from __future__ import annotations

import dataclasses
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
from tests.faults.processes import state_of
from tests.faults.runs import SMALL, bits, whole
from tests.faults.suite import Row

_AT, _TASK = 13, 2  # meta-steps before, and the task of the batch
_SIGN = 9.0  # a pixel that no image has


def steep(forward: Forward, *, infinite: bool) -> Forward:
    """The same values; where an image shows the sign, a gradient that is infinite, or NaN."""

    def changed(params: Params, x: Tensor) -> Tensor:
        bias = next(iter(params.values())).sum()
        none = bias - bias.detach()
        u = none if infinite else none.pow(2)
        flagged = x.amax() == _SIGN
        return forward(params, x) + torch.where(flagged, torch.where(flagged, u, 1.0).sqrt(), 0.0)

    return changed


def poison(kind: str, value: float, patch: pytest.MonkeyPatch) -> None:
    """Have one task of one meta-step bring a number that is not finite."""

    def build_steep(config: TrainConfig) -> Experiment:
        experiment = build_experiment(config)
        return dataclasses.replace(experiment, forward=steep(experiment.forward, infinite=math.isinf(value)))

    def own_poisoned(experiment: Experiment, iteration: int, ranks: DistributedContext) -> Episodes:
        episodes = local_tasks(experiment, iteration, ranks)
        if iteration == _AT:
            x = episodes.support_x if kind == "support" else episodes.query_x
            x[_TASK, 0] = _SIGN if kind == "gradient" else value
        return episodes

    patch.setattr(training, "build_experiment", build_steep)
    patch.setattr(outer_loop, "local_tasks", own_poisoned)


def run(folder: Path, *more: str) -> None:
    """Train in this process."""
    training.train(to_dataclass(compose("train", [*SMALL, *more]), TrainConfig), folder)


def not_a_number(i: int, folder: Path, shared: Path) -> None:
    """NaN and infinity in the support loss, the query loss, and the gradient."""
    kind, value = ("support", "query", "gradient")[i // 2], (math.nan, math.inf)[i % 2]
    with pytest.MonkeyPatch.context() as patch:
        poison(kind, value, patch)
        with pytest.raises(RunError) as raised:
            run(folder / "run")
    message = str(raised.value)
    step = {"support": "after 0 inner steps", "query": "after 1 inner steps", "gradient": "back to inner step 1"}[kind]
    named = (f"meta-step {_AT + 1}:", f"of task {_TASK} is", step, "smaller inner.lr", "run.on_nonfinite=skip")
    for words in (*named, f"checkpoint of meta-step {_AT} is kept"):
        assert words in message, message
    state = state_of(folder / "run")["state"]
    assert state["iteration"] == _AT
    assert all(torch.isfinite(p).all() for p in state["params"].values())
    (episode,) = (folder / "run" / "nonfinite").glob("*.pt")
    if kind != "gradient":  # which is the patched model's
        with pytest.raises(NonFiniteLossError, match=f"{kind} loss of task 0"):
            replay_episode(episode)
    run(folder / "run", "run.resume=true")  # without the fault it goes on as if there had been none
    ours, theirs = state_of(folder / "run")["state"], state_of(whole(shared))["state"]
    for name in ("params", "optimizer", "best"):
        assert bits(ours[name]) == bits(theirs[name]), name


NONFINITE = Row(
    "nonfinite",
    "NaN or Inf in support loss, query loss, gradient",
    "stopped before the step, named, last checkpoint intact",
    tries=6,
    attempt=not_a_number,
    short=(0, 3, 4),
    seconds=1,
)
