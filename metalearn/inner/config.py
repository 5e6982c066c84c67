"""The settings of an inner loop: its steps, its update rule, the adapted parameters and the query objective."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Integral, Real

from torch import Tensor

from metalearn.core.deprecation import adopt_former_methods, renamed
from metalearn.core.types import Forward, Params
from metalearn.inner.update_rules import FORMER_METHODS, SGD, UpdateRule

LEARNED_LR_MODES = ("parameter", "layer", "layer_and_step")
"""Names for ``InnerLoop.learned_lr``."""

Initializer = Callable[[Forward, Params, Tensor, Tensor], Params]
"""``initializer(forward, fast, support_x, support_y)``: the tasks' first parameters, from T copies of theta."""


@renamed(
    adapted="adapted_params",
    per_step="per_step_params",
    proximal="proximal_weight",
    start="initializer",
    plain="is_plain_sgd",
    weights="query_loss_weights",
)
@dataclass(frozen=True)
class InnerLoop:
    """Settings of the inner loop.

    Args:
        lr: step size alpha of the inner gradient descent, positive; the initial value of learned ones.
        steps: K, the number of inner steps, at least 0.
        second_order: whether the meta-gradient goes through the inner gradients (MAML) or takes them as
            constants (first-order MAML).
        engine: how the meta-gradient is computed, one of ``metalearn.metagrad.ENGINES``.
        task_chunk: at most this many tasks are held in memory at a time; ``None`` takes all at once.
        snapshot_every: the engines ``checkpoint`` and ``adjoint`` keep the fast weights of every s-th step and
            recompute those between, in one more first-order step each; 1 keeps all.
        rule: from gradients to directions: ``SGD()``, ``Momentum()``, ``Adam()``, or any ``UpdateRule``.
        learned_lr: whether step sizes are meta-parameters: ``"parameter"``, one for every entry (Meta-SGD);
            ``"layer"``, one for every tensor; ``"layer_and_step"``, K for every tensor (MAML++).
            ``with_learned_lrs`` adds them to theta.
        weight_decay: of the adapted parameters, added to the gradients: ``g + weight_decay * theta_k``.
        clip_norm: largest norm of a task's gradients over all adapted parameters; ``None`` does not clip.
        proximal_weight: of the pull towards the task's first parameters:
            ``g + proximal_weight * (theta_k - theta_0)`` (iMAML).
        adapted_params: names of the parameters that are adapted (ANIL: the head's); ``None``: all.
        query_weights: w_0, ..., w_K: the objective is sum_k w_k L_query(theta_k); ``None``: L_query(theta_K) alone.
        per_step_params: names of parameters with a separate value for every step, ``[K + 1, ...]`` in theta: the
            model is given the k-th after k steps (MAML++'s BatchNorm). ``with_per_step_params`` makes them.
        initializer: gives the tasks' first parameters, where they are not theta.

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
    proximal_weight: float = 0.0
    adapted_params: frozenset[str] | None = None
    query_weights: tuple[float, ...] | None = None
    per_step_params: frozenset[str] = frozenset()
    initializer: Initializer | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.second_order, bool):
            raise ValueError(f"InnerLoop: second_order={self.second_order!r}; it must be True or False.")
        if not isinstance(self.engine, str):
            raise ValueError(f"InnerLoop: engine={self.engine!r}; it must be a name, as in engine='unroll'.")
        if self.learned_lr is not None and self.learned_lr not in LEARNED_LR_MODES:
            raise ValueError(
                f"InnerLoop: learned_lr={self.learned_lr!r}; it must be one of {', '.join(LEARNED_LR_MODES)}, or None."
            )
        if isinstance(self.rule, type):
            raise ValueError(
                f"InnerLoop: rule={self.rule.__name__} is a class; make one of it: {self.rule.__name__}()."
            )
        adopt_former_methods(type(self.rule), FORMER_METHODS)
        if missing := [method for method in ("init", "update") if not hasattr(self.rule, method)]:
            raise ValueError(
                f"InnerLoop: rule={self.rule!r} has no {missing[0]}; it must be an update rule: metalearn.SGD(), "
                "Momentum(), Adam(), or one of your own with init and update (metalearn.UpdateRule)."
            )
        for setting in ("adapted_params", "per_step_params"):
            if isinstance(names := getattr(self, setting), str):
                raise ValueError(f"InnerLoop: {setting}={names!r}; it must be a set of names, as in {{{names!r}}}.")
            object.__setattr__(self, setting, names if names is None else frozenset(names))
        if self.adapted_params is not None and not self.adapted_params:
            raise ValueError("InnerLoop: adapted_params is empty; name a parameter, or take steps=0 to adapt nothing.")
        self._convert_numbers()
        self._convert_query_weights()

    def _convert_numbers(self) -> None:
        """Check the ranges; convert to Python's own numbers, as numpy's and fractions do not multiply tensors."""
        for name, least, needed in (
            ("steps", 0, "a whole number, 0 or more"),
            ("snapshot_every", 1, "a whole number, 1 or more"),
            ("task_chunk", 1, "at least 1, or None for all tasks"),
        ):
            value = getattr(self, name)
            if name == "task_chunk" and value is None:
                continue
            if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
                raise ValueError(f"InnerLoop: {name}={value!r}; it must be {needed}.")
            object.__setattr__(self, name, int(value))
        for name, may_be_zero, needed in (
            ("lr", False, "a positive number"),
            ("weight_decay", True, "a number, 0 or more"),
            ("proximal_weight", True, "a number, 0 or more"),
            ("clip_norm", False, "a positive number, or None"),
        ):
            if name == "clip_norm" and self.clip_norm is None:
                continue
            number = _as_float(getattr(self, name))
            if not math.isfinite(number) or number < 0 or (number == 0 and not may_be_zero):
                raise ValueError(f"InnerLoop: {name}={getattr(self, name)!r}; it must be {needed}.")
            object.__setattr__(self, name, number)

    def _convert_query_weights(self) -> None:
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
    def is_plain_sgd(self) -> bool:
        """Whether a step is theta - lr * g with a fixed step size, and nothing else."""
        extras = (self.learned_lr, self.weight_decay, self.clip_norm, self.proximal_weight)
        return type(self.rule) is SGD and not any(extras)

    @property
    def query_loss_weights(self) -> tuple[float, ...]:
        """w_0, ..., w_K of the query losses."""
        return self.query_weights or (*(0.0,) * self.steps, 1.0)


def _as_float(value: object) -> float:
    """Return NaN for what is no number, and infinity for one that is too large."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf
