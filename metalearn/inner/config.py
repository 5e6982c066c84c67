"""What an inner loop is, as data: its steps, its rule, what it adapts, and where its query loss is taken."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Integral, Real

from torch import Tensor

from metalearn.core.types import Forward, Params
from metalearn.inner.update_rules import SGD, UpdateRule

LEARNED_LR_MODES = ("parameter", "layer", "layer_and_step")
"""Names for ``InnerLoop.learned_lr``."""

Initializer = Callable[[Forward, Params, Tensor, Tensor], Params]
"""``start(forward, fast, support_x, support_y)``: what T tasks begin with, from T copies of theta; differentiable."""


@dataclass(frozen=True)
class InnerLoop:
    """Settings of the inner loop.

    Args:
        lr: step size alpha of the inner gradient descent, positive; with ``learned_lr`` what learned ones begin at.
        steps: K, the number of inner steps, at least 0.
        second_order: whether the meta-gradient goes through the inner gradients (MAML) or takes them as
            constants (first-order MAML).
        engine: how the meta-gradient is computed, one of ``metalearn.metagrad.ENGINES``.
        task_chunk: at most this many tasks are held in memory at a time; ``None`` takes all at once.
        snapshot_every: the engines ``checkpoint`` and ``adjoint`` keep the fast weights of every s-th step and
            compute those between again, in one more first-order step each; 1 keeps all.
        rule: from gradients to directions: ``SGD()``, ``Momentum()``, ``Adam()``, or one's own.
        learned_lr: whether step sizes are meta-parameters: ``"parameter"``, one for every entry (Meta-SGD);
            ``"layer"``, one for every tensor; ``"layer_and_step"``, K for every tensor (MAML++). ``with_learned`` adds
            them to theta.
        weight_decay: of the adapted parameters, added to the gradients: ``g + weight_decay * theta_k``.
        clip_norm: largest norm of a task's gradients over all that is adapted; ``None`` does not clip.
        proximal: pulls back to where the task began: ``g + proximal * (theta_k - theta_0)`` (iMAML).
        adapted: names of the parameters that are adapted (ANIL: the head's); ``None``: all.
        query_weights: w_0, ..., w_K: the objective is sum_k w_k L_query(theta_k); ``None``: L_query(theta_K) alone.
        per_step: names of parameters of which every step has its own, ``[K + 1, ...]`` in theta: the model is given
            the k-th after k steps (MAML++'s BatchNorm). ``with_steps`` makes them.
        start: what tasks begin with, where that is not theta.

    Raises:
        ValueError: if a setting is out of range, or of another type.
    """

    lr: float
    steps: int
    second_order: bool = True
    engine: str = "unroll"
    task_chunk: int | None = None
    snapshot_every: int = 1
    rule: UpdateRule = field(default_factory=SGD)
    learned_lr: str | None = None
    weight_decay: float = 0.0
    clip_norm: float | None = None
    proximal: float = 0.0
    adapted: frozenset[str] | None = None
    query_weights: tuple[float, ...] | None = None
    per_step: frozenset[str] = frozenset()
    start: Initializer | None = None

    def __post_init__(self) -> None:
        lr = _as_float(self.lr)
        if not (math.isfinite(lr) and lr > 0):
            raise ValueError(f"InnerLoop: lr={self.lr!r}; it must be a positive number.")
        if not isinstance(self.second_order, bool):
            raise ValueError(f"InnerLoop: second_order={self.second_order!r}; it must be True or False.")
        if not isinstance(self.engine, str):
            raise ValueError(f"InnerLoop: engine={self.engine!r}; it must be a name, as in engine='unroll'.")
        if not _is_whole(self.steps) or self.steps < 0:
            raise ValueError(f"InnerLoop: steps={self.steps!r}; it must be a whole number, 0 or more.")
        if self.task_chunk is not None and (not _is_whole(self.task_chunk) or self.task_chunk < 1):
            raise ValueError(
                f"InnerLoop: task_chunk={self.task_chunk!r}; it must be at least 1, or None for all tasks."
            )
        if not _is_whole(self.snapshot_every) or self.snapshot_every < 1:
            raise ValueError(
                f"InnerLoop: snapshot_every={self.snapshot_every!r}; it must be a whole number, 1 or more."
            )
        object.__setattr__(self, "lr", lr)  # numpy's numbers and fractions do not multiply or split tensors
        for name in ("steps", "task_chunk", "snapshot_every"):
            value = getattr(self, name)
            object.__setattr__(self, name, value if value is None else int(value))
        self._check_the_step()
        self._check_the_objective()

    def _check_the_step(self) -> None:
        if lacking := [member for member in ("__call__", "start") if not hasattr(self.rule, member)]:
            raise ValueError(
                f"InnerLoop: rule={self.rule!r} has no {lacking[0]}; it must be an update rule: metalearn.SGD(), "
                "Momentum(), Adam(), or one of your own with start and __call__ (metalearn.UpdateRule)."
            )
        if isinstance(self.rule, type):
            raise ValueError(
                f"InnerLoop: rule={self.rule.__name__} is a class; make one of it: {self.rule.__name__}()."
            )
        if self.learned_lr is not None and self.learned_lr not in LEARNED_LR_MODES:
            raise ValueError(
                f"InnerLoop: learned_lr={self.learned_lr!r}; it must be one of {', '.join(LEARNED_LR_MODES)}, or None."
            )
        for name in ("weight_decay", "proximal"):
            value = _as_float(getattr(self, name))
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"InnerLoop: {name}={getattr(self, name)!r}; it must be a number, 0 or more.")
            object.__setattr__(self, name, value)
        if self.clip_norm is not None:
            largest = _as_float(self.clip_norm)
            if not (math.isfinite(largest) and largest > 0):
                raise ValueError(f"InnerLoop: clip_norm={self.clip_norm!r}; it must be a positive number, or None.")
            object.__setattr__(self, "clip_norm", largest)
        for name in ("adapted", "per_step"):
            if isinstance(names := getattr(self, name), str):
                raise ValueError(f"InnerLoop: {name}={names!r}; it must be a set of names, as in {{{names!r}}}.")
            object.__setattr__(self, name, names if names is None else frozenset(names))
        if self.adapted is not None and not self.adapted:
            raise ValueError("InnerLoop: adapted is empty; name a parameter, or take steps=0 to adapt nothing.")

    def _check_the_objective(self) -> None:
        if self.query_weights is None:
            return
        weights = tuple(_as_float(w) for w in self.query_weights)
        if len(weights) != self.steps + 1 or not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
            raise ValueError(
                f"InnerLoop: query_weights={self.query_weights!r}; they must be {self.steps + 1} numbers, 0 or more "
                "and not all 0: one for the parameters before the first step, and one after each of the steps."
            )
        object.__setattr__(self, "query_weights", weights)

    @property
    def plain(self) -> bool:
        """Whether a step is theta - lr * g with a fixed step size, and nothing else."""
        extras = (self.learned_lr, self.weight_decay, self.clip_norm, self.proximal)
        return isinstance(self.rule, SGD) and not any(extras)

    @property
    def weights(self) -> tuple[float, ...]:
        """w_0, ..., w_K of the query losses."""
        return self.query_weights or (*(0.0,) * self.steps, 1.0)


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _as_float(value: object) -> float:
    """NaN for what is no number, infinity for one too large."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf
