"""Everything that changes in a training: the meta-optimizer (Adam), the best parameters, the random generators."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.optim import Adam, Optimizer

from metalearn.config.schema import OuterConfig
from metalearn.core.errors import RunError
from metalearn.core.types import Params


class BestCheckpoint(NamedTuple):
    """The parameters with the best validation score so far (an accuracy is a fraction), and their meta-step."""

    iteration: int
    validation_score: float
    params: Params


def build_meta_optimizer(params: Params, lr: float) -> Optimizer:
    """Return the meta-optimizer. To train with another than Adam, change it here.

    On GPUs it is fused into one kernel. On CPUs it is not, so that runs keep the bits of earlier versions.
    """
    return Adam(params.values(), lr=lr, fused=_is_fused(params))


def _is_fused(params: Params) -> bool | None:
    return True if all(p.is_cuda for p in params.values()) else None


def learning_rate(outer: OuterConfig, iteration: int) -> float:
    """Return the meta-learning rate after ``iteration`` meta-steps: constant, or half a cosine from ``outer.lr`` to 0.

        lr_t = lr (1 + cos(pi t / T)) / 2

    (Loshchilov & Hutter 2017, arXiv 1608.03983, eq. 5, without restarts.) It is a function of the meta-step alone, so
    that a resumed run has no scheduler to restore.
    """
    if outer.schedule == "constant":
        return outer.lr
    return outer.lr * (1 + math.cos(math.pi * iteration / outer.iterations)) / 2


@dataclass
class TrainState:
    """Everything that changes from one meta-step to the next.

    Args:
        iteration: meta-steps taken or skipped.
        last_validated: meta-step after which the last validation finished.
        skipped: meta-steps without an update, because a loss or a gradient was not finite.
        consecutive_skips: those since the last update.
        best: the parameters that will be tested.
        is_consistent: false while an update is under way.
        threads: number of CPU threads at the checkpoint that was loaded; with another, sums are rounded differently.
        thread_choices: numbers that ``run.threads=auto`` chooses from.
    """

    params: Params
    optimizer: Optimizer
    outer: OuterConfig
    iteration: int = 0
    last_validated: int = 0
    skipped: int = 0
    consecutive_skips: int = 0
    best: BestCheckpoint | None = None
    is_consistent: bool = True
    threads: int | None = None
    thread_choices: tuple[int, ...] | None = None

    @classmethod
    def create(cls, theta: Params, outer: OuterConfig) -> TrainState:
        """Return the state before the first meta-step."""
        params = {name: p.clone() for name, p in theta.items()}
        return cls(params, build_meta_optimizer(params, outer.lr), outer)

    @property
    def lr(self) -> float:
        """Learning rate of the next meta-step."""
        return learning_rate(self.outer, self.iteration)

    def is_finite(self) -> bool:
        """Return whether every parameter is finite."""
        return all(bool(torch.isfinite(p).all()) for p in self.params.values())

    def state_dict(self) -> dict[str, Any]:
        """Return the state and every random state as plain containers of tensors."""
        return {
            "params": {name: p.detach() for name, p in self.params.items()},
            "optimizer": self.optimizer.state_dict(),
            "iteration": self.iteration,
            "validated": self.last_validated,
            "skipped": [self.skipped, self.consecutive_skips],
            "best": [self.best.iteration, self.best.validation_score, self.best.params] if self.best else None,
            "random": get_rng_state(),
            "threads": torch.get_num_threads(),
            "thread_choices": None if self.thread_choices is None else list(self.thread_choices),
        }

    def load_state_dict(self, content: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned, on this device or another; the optimizer stays fused or not."""
        self.load_params(content["params"])
        groups = [{**group, "fused": _is_fused(self.params)} for group in content["optimizer"]["param_groups"]]
        self.optimizer.load_state_dict({**content["optimizer"], "param_groups": groups})
        self.iteration = content["iteration"]
        self.last_validated = content["validated"]
        self.skipped, self.consecutive_skips = content["skipped"]
        self.best = None
        if content["best"]:
            iteration, score, best = content["best"]
            self.best = BestCheckpoint(
                iteration, score, {name: best[name].to(p.device) for name, p in self.params.items()}
            )
        set_rng_state(content["random"])
        self.threads = content.get("threads")  # checkpoints of earlier releases lack both
        choices = content.get("thread_choices")
        self.thread_choices = None if choices is None else tuple(choices)

    @torch.no_grad()
    def load_params(self, params: Params) -> None:
        """Copy parameters into the state; raise ``RunError`` if they belong to another model."""
        check_same_shapes(params, self.params)
        for name, p in self.params.items():
            p.copy_(params[name])


def check_same_shapes(found: Params, expected: Params) -> None:
    """Raise ``RunError``, naming the first parameter that differs, if loaded parameters do not fit the model."""
    have, want = ({name: tuple(p.shape) for name, p in tree.items()} for tree in (found, expected))
    for name in sorted({*have, *want}):
        if have.get(name) != want.get(name):
            raise RunError(
                f"the checkpoint does not fit the model: parameter '{name}' is {have.get(name, 'missing')} in it and "
                f"{want.get(name, 'missing')} in the model that the configuration describes."
            )


def equal_params(a: Params, b: Params) -> bool:
    """Return whether two trees of parameters are equal, bit by bit but for the sign of zeros."""
    return a.keys() == b.keys() and all(torch.equal(p.cpu(), b[name].cpu()) for name, p in a.items())


def seed_all(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators; numpy's takes the lower 32 bits."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def preserve_rng_state() -> Iterator[None]:
    """Restore the states of all random generators after the block, which may draw and seed."""
    before = get_rng_state()
    try:
        yield
    finally:
        set_rng_state(before)


def get_rng_state() -> dict[str, Any]:
    """Return the states of all random generators as plain containers."""
    version, numbers, gauss = random.getstate()
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore what ``get_rng_state`` returned; GPUs' generators only if there are as many GPUs as before."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count() > 0:
        torch.cuda.set_rng_state_all(state["cuda"])
