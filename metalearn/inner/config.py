"""``InnerLoop``, the settings of an inner loop; a training makes it of its ``inner.*`` keys."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Integral, Real

from torch import Tensor

from metalearn.core.deprecation import adopt_former_methods, renamed
from metalearn.core.short_repr import short_repr
from metalearn.core.text import plural
from metalearn.core.types import Forward, Params
from metalearn.inner.transforms import GradientTransform
from metalearn.inner.update_rules import FORMER_METHODS, SGD, UpdateRule

LEARNED_LR_MODES = ("parameter", "layer", "layer_and_step")
"""Names for ``InnerLoop.learned_lr``."""

ENGINE_NAMES = ("unroll", "checkpoint", "adjoint")
"""Names for ``InnerLoop.engine``; a test holds them equal to ``metalearn.metagrad.ENGINES``."""

_WHOLE_NUMBERS = ("steps", "task_chunk", "checkpoint_every")
_NUMBERS = ("lr", "weight_decay", "decoupled_weight_decay", "proximal_weight", "clip_norm")

Initializer = Callable[[Forward, Params, Tensor, Tensor], Params]
"""``initializer(forward, fast, support_x, support_y)``: the tasks' first parameters, from T copies of theta."""


@renamed(
    adapted="adapted_params",
    per_step="per_step_params",
    proximal="proximal_weight",
    snapshot_every="checkpoint_every",
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
        engine: how the meta-gradient is computed, ``unroll``, ``checkpoint`` or ``adjoint``; ``auto`` is for a
            training, which measures them.
        task_chunk: at most this many tasks are held in memory at a time; ``None``: on a GPU all of them, on a CPU
            as many as are fast (all, unless the model's maps are large).
        checkpoint_every: the engines ``checkpoint`` and ``adjoint`` keep the fast weights of every s-th step and
            recompute those between, in one more first-order step each; 1 keeps all.
        rule: from gradients to directions: ``SGD()``, ``Momentum()``, ``Adam()``, or any ``UpdateRule``; a run's key
            ``inner.optimizer`` names one.
        learned_lr: whether step sizes are meta-parameters: ``"parameter"``, one for every entry (Meta-SGD);
            ``"layer"``, one for every tensor; ``"layer_and_step"``, K for every tensor (MAML++).
            ``with_learned_lrs`` adds them to theta.
        transform: a learned preconditioner of the gradients that the rule is given: ``MetaCurvature()``, or any
            ``GradientTransform``. ``with_transform`` adds what it learns to theta.
        weight_decay: of the adapted parameters, added to the gradients: ``g + weight_decay * theta_k``.
        decoupled_weight_decay: added to the directions instead: ``d + decoupled_weight_decay * theta_k``; with
            ``rule=Adam()`` this is AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101).
        lr_scale: ``lr_scale(k, name)`` multiplies the step size of parameter ``name`` in step k: a schedule, or step
            sizes by parameter, as ``lambda k, name: 0.1 if name.startswith("body.") else 1.0``.
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
    checkpoint_every: int = 1
    rule: UpdateRule = field(default_factory=SGD)
    learned_lr: str | None = None
    transform: GradientTransform | None = None
    weight_decay: float = 0.0
    decoupled_weight_decay: float = 0.0
    lr_scale: Callable[[int, str], float] | None = None
    clip_norm: float | None = None
    proximal_weight: float = 0.0
    adapted_params: frozenset[str] | None = None
    query_weights: tuple[float, ...] | None = None
    per_step_params: frozenset[str] = frozenset()
    initializer: Initializer | None = None

    __repr__ = short_repr

    def __post_init__(self) -> None:
        lr, decay, decoupled, proximal, clip = (_as_float(getattr(self, name)) for name in _NUMBERS)
        for name, is_valid, needed in (
            ("lr", 0 < lr < math.inf, "a positive number"),
            ("steps", _is_whole(self.steps, least=0), "a whole number, 0 or more"),
            ("second_order", isinstance(self.second_order, bool), "True or False"),
            (
                "task_chunk",
                self.task_chunk is None or _is_whole(self.task_chunk),
                "at least 1, or None",
            ),
            ("checkpoint_every", _is_whole(self.checkpoint_every), "a whole number, 1 or more"),
            (
                "learned_lr",
                self.learned_lr in (None, *LEARNED_LR_MODES),
                f"one of {', '.join(LEARNED_LR_MODES)}, or None",
            ),
            ("weight_decay", 0 <= decay < math.inf, "a number, 0 or more"),
            ("decoupled_weight_decay", 0 <= decoupled < math.inf, "a number, 0 or more"),
            ("lr_scale", self.lr_scale is None or callable(self.lr_scale), "a function of k and name, or None"),
            ("proximal_weight", 0 <= proximal < math.inf, "a number, 0 or more"),
            ("clip_norm", self.clip_norm is None or 0 < clip < math.inf, "a positive number, or None"),
        ):
            if not is_valid:
                raise ValueError(f"InnerLoop: {name}={getattr(self, name)!r}; it must be {needed}.")
        # Python's own numbers, as numpy's and fractions do not multiply tensors
        for convert, names in ((int, _WHOLE_NUMBERS), (float, _NUMBERS)):
            for name in names:
                if (value := getattr(self, name)) is not None:
                    object.__setattr__(self, name, convert(value))
        self._check_engine()
        self._check_rule()
        has_methods = all(callable(getattr(self.transform, name, None)) for name in ("init", "apply"))
        if self.transform is not None and (isinstance(self.transform, type) or not has_methods):
            raise ValueError(
                f"InnerLoop: transform={self.transform!r}; it must be an object with the methods init and apply, such "
                "as metalearn.inner.MetaCurvature(), or None."
            )
        for setting in ("adapted_params", "per_step_params"):
            if isinstance(value := getattr(self, setting), str):
                raise ValueError(f"InnerLoop: {setting}={value!r}; it must be a set of names, as in {{{value!r}}}.")
            object.__setattr__(self, setting, value if value is None else frozenset(value))
        if self.adapted_params is not None and not self.adapted_params:
            raise ValueError("InnerLoop: adapted_params is empty; name a parameter, or take steps=0 to adapt nothing.")
        self._convert_query_weights()

    def _check_engine(self) -> None:
        if isinstance(self.engine, str) and self.engine in (*ENGINE_NAMES, "auto"):
            return
        near = difflib.get_close_matches(str(self.engine).lower(), ENGINE_NAMES, n=1)
        raise ValueError(
            f"InnerLoop: engine={self.engine!r}; it must be one of {', '.join(ENGINE_NAMES)}."
            + "".join(f" Did you mean {name!r}?" for name in near)
        )

    def _check_rule(self) -> None:
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

    def _convert_query_weights(self) -> None:
        if self.query_weights is None:
            return
        weights = tuple(_as_float(w) for w in self.query_weights)
        if len(weights) != self.steps + 1 or not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
            raise ValueError(
                f"InnerLoop: query_weights={self.query_weights!r}; they must be "
                f"{plural(self.steps + 1, 'number')}, 0 or more and not all 0: one for "
                "the parameters before the first step, and one after each of the steps."
            )
        object.__setattr__(self, "query_weights", weights)

    @property
    def is_plain_sgd(self) -> bool:
        """True if a step is theta - lr * g with a fixed step size, and nothing else."""
        extras = (self.learned_lr, self.lr_scale, *(getattr(self, name) for name in _NUMBERS if name != "lr"))
        return type(self.rule) is SGD and self.transform is None and not any(extras)

    @property
    def query_loss_weights(self) -> tuple[float, ...]:
        """w_0, ..., w_K of the query losses."""
        return self.query_weights or (*(0.0,) * self.steps, 1.0)


def _is_whole(value: object, *, least: int = 1) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def _as_float(value: object) -> float:
    """Return NaN for what is no number, and infinity for one that is too large."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf
