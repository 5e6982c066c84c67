"""What changes from one meta-step to the next, and how it is put away and taken up again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.optim import Adam

from metalearn.config.schema import OuterConfig
from metalearn.core.errors import RunError
from metalearn.core.types import Params
from metalearn.training.random_state import get_rng_state, set_rng_state


class BestCheckpoint(NamedTuple):
    """The parameters with the best validation score so far (an accuracy is a fraction): after so many meta-steps."""

    iteration: int
    validation_score: float
    params: Params


def learning_rate(outer: OuterConfig, iteration: int) -> float:
    """Of the meta-step that follows ``iteration`` others: constant, or half a cosine from ``outer.lr`` to 0.

        lr_t = lr (1 + cos(pi t / T)) / 2

    (Loshchilov & Hutter 2017, arXiv 1608.03983, eq. 5, without restarts.) It has no state: a run that goes on, skips a
    meta-step or goes on with another rate needs to put nothing right.
    """
    if outer.schedule == "constant":
        return outer.lr
    return outer.lr * (1 + math.cos(math.pi * iteration / outer.iterations)) / 2


def use_fused_adam(params: Params) -> bool | None:
    """Whether Adam is one kernel: on GPUs, where it otherwise takes a dozen; CPUs keep the bits of earlier runs."""
    return True if all(p.is_cuda for p in params.values()) else None


@dataclass
class TrainState:
    """The only mutable object of a run.

    Args:
        params: the meta-parameters theta.
        optimizer: of them, with its moments.
        outer: settings of the meta-optimiser.
        iteration: meta-steps taken or skipped.
        validated: the one after which validation was last finished.
        skipped: meta-steps without the optimiser's, as a loss or a gradient was not finite.
        consecutive_skips: those since the last that was taken.
        best: what the test will be of.
        whole: false while a meta-step is changing it.
    """

    params: Params
    optimizer: Adam
    outer: OuterConfig
    iteration: int = 0
    validated: int = 0
    skipped: int = 0
    consecutive_skips: int = 0
    best: BestCheckpoint | None = None
    whole: bool = True

    @classmethod
    def start(cls, theta: Params, outer: OuterConfig) -> TrainState:
        """Before the first meta-step."""
        params = {name: p.clone() for name, p in theta.items()}
        return cls(params, Adam(params.values(), lr=outer.lr, fused=use_fused_adam(params)), outer)

    @property
    def lr(self) -> float:
        """The learning rate of the next meta-step."""
        return learning_rate(self.outer, self.iteration)

    def finite(self) -> bool:
        """Whether every parameter is."""
        return all(bool(torch.isfinite(p).all()) for p in self.params.values())

    def content(self) -> dict[str, Any]:
        """All of it, and every random state, as plain containers of tensors."""
        return {
            "params": {name: p.detach() for name, p in self.params.items()},
            "optimizer": self.optimizer.state_dict(),
            "iteration": self.iteration,
            "validated": self.validated,
            "skipped": [self.skipped, self.consecutive_skips],
            "best": [self.best.iteration, self.best.validation_score, self.best.params] if self.best else None,
            "random": get_rng_state(),
        }

    @torch.no_grad()
    def restore(self, content: Mapping[str, Any]) -> None:
        """Go on from what ``content`` gave, on this device or another: the optimiser stays fused or not, as it began.

        Raises:
            RunError: if it is of another model.
        """
        check_same_shapes(content["params"], self.params)
        for name, p in self.params.items():
            p.copy_(content["params"][name])
        groups = [{**group, "fused": use_fused_adam(self.params)} for group in content["optimizer"]["param_groups"]]
        self.optimizer.load_state_dict({**content["optimizer"], "param_groups": groups})
        self.iteration = content["iteration"]
        self.validated = content["validated"]
        self.skipped, self.consecutive_skips = content["skipped"]
        self.best = None
        if content["best"]:
            iteration, accuracy, best = content["best"]
            self.best = BestCheckpoint(
                iteration, accuracy, {name: best[name].to(p.device) for name, p in self.params.items()}
            )
        set_rng_state(content["random"])


def check_same_shapes(found: Params, wanted: Params) -> None:
    """Refuse parameters that are not this model's.

    Raises:
        RunError: naming the first that differs.
    """
    have, want = ({name: tuple(p.shape) for name, p in tree.items()} for tree in (found, wanted))
    for name in sorted({*have, *want}):
        if have.get(name) != want.get(name):
            raise RunError(
                f"the checkpoint does not fit the model: parameter '{name}' is {have.get(name, 'missing')} in it and "
                f"{want.get(name, 'missing')} in the model that the configuration describes."
            )
