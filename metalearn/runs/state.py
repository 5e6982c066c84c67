"""What changes from one meta-step to the next, and how it is put away and taken up again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

from metalearn.runs.schema import OuterConfig
from metalearn.types import Params


class Best(NamedTuple):
    """Which parameters lie in the best checkpoint: those after ``iteration`` meta-steps."""

    iteration: int
    validation_accuracy: float


@dataclass
class TrainState:
    """The only mutable object of a run."""

    params: Params
    optimizer: Adam
    schedule: CosineAnnealingLR | None
    iteration: int = 0
    best: Best | None = None

    @classmethod
    def start(cls, theta: Params, outer: OuterConfig) -> TrainState:
        """Before the first meta-step."""
        params = {name: p.clone() for name, p in theta.items()}
        optimizer = Adam(params.values(), lr=outer.lr)
        cosine = outer.schedule == "cosine"
        return cls(params, optimizer, CosineAnnealingLR(optimizer, outer.iterations) if cosine else None)

    def content(self) -> dict[str, Any]:
        """All of it, and the random state, as plain containers of tensors."""
        return {
            "params": {name: p.detach() for name, p in self.params.items()},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict() if self.schedule else None,
            "iteration": self.iteration,
            "best": tuple(self.best) if self.best else None,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        }

    @torch.no_grad()
    def restore(self, content: Mapping[str, Any]) -> None:
        """Go on from what ``content`` gave, for the same model and settings."""
        for name, p in self.params.items():
            p.copy_(content["params"][name])
        self.optimizer.load_state_dict(content["optimizer"])
        if self.schedule:
            self.schedule.load_state_dict(content["schedule"])
        self.iteration = content["iteration"]
        self.best = Best(*content["best"]) if content["best"] else None
        torch.set_rng_state(content["random"].cpu())
        if len(content["random_cuda"]) == torch.cuda.device_count() > 0:
            torch.cuda.set_rng_state_all([state.cpu() for state in content["random_cuda"]])
