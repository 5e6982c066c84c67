"""Methods to compare: this project's engines, a hand-written loop, and other libraries; and a check that they agree."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from metalearn.core.errors import RunError
from metalearn.core.functional import functionalize
from metalearn.core.params import relative_error
from metalearn.core.types import Episodes, MetaGradient, Params
from metalearn.inner import InnerLoop
from metalearn.metagrad import ENGINES, meta_gradient
from metalearn.metagrad.baselines import by_hand, torch_func
from metalearn.metagrad.baselines.common import Baseline, UnsupportedSettingError, installed_peers

log = logging.getLogger(__name__)

OURS, BY_HAND, TORCH_FUNC, LEARN2LEARN = "metalearn", "hand-written loop", "torch.func", "learn2learn"
JAX, PLAIN = "JAX", "unroll, plain"

BATCHES, TASKS_COMPARED = 5, 2
"""Number of batches on which the methods' gradients are compared, and of tasks in each."""

_FLOAT64_TOLERANCE = 1e-9
_FLOAT32_TOLERANCE = 1e-4
_TIMES_LOOP, _FLOAT32_CEILING = 4.0, 0.1


class DisagreementError(RunError):
    """Methods compute different gradients, so that their times cannot be compared."""


@dataclass(frozen=True)
class Method:
    """A way to compute the meta-gradient of a module."""

    library: str
    engine: str
    second_order: bool
    step: Callable[[nn.Module, Episodes], Any]

    @property
    def label(self) -> str:
        """Library and engine."""
        return f"{self.library} {self.engine}".strip()

    @property
    def name(self) -> str:
        """Library, engine and order."""
        return f"{self.label}, {order_name(self.second_order)}"

    def gradient(self, module: nn.Module, episodes: Episodes, dtype: torch.dtype) -> Params:
        """Return the meta-gradient of a copy of the module in ``dtype``."""
        tasks = Episodes(episodes.support_x.to(dtype), episodes.support_y, episodes.query_x.to(dtype), episodes.query_y)
        return {name: g.clone() for name, g in self.step(copy.deepcopy(module).to(dtype), tasks).grads.items()}


def order_name(second_order: bool) -> str:
    """Return ``second order`` or ``first order``."""
    return "second order" if second_order else "first order"


def available_baselines() -> dict[str, Baseline]:
    """Return the hand-written loop, torch.func and the installed libraries; warn about those that are missing."""
    peers, missing = installed_peers()
    jax, no_jax = installed_peers({JAX: "jax"}, __package__)  # tied to our networks, and no peer of a training
    for name, reason in (missing | no_jax).items():
        log.warning(
            "%s is left out: %s. To compare with it, install it with `pip install -r requirements-peers.txt`.",
            *(name, reason),
        )
    return {BY_HAND: by_hand.meta_gradient, TORCH_FUNC: torch_func.meta_gradient, **peers, **jax}


def leave_out_unsupported(
    baselines: Mapping[str, Baseline], module: nn.Module, episodes: Episodes, inner: InnerLoop
) -> dict[str, Baseline]:
    """Return the baselines that compute this model and inner loop; warn about the others, with the reason.

    Raises:
        UnsupportedSettingError: if the hand-written loop does not, so that nothing is left to compare with.
    """
    supporting, one_task = {}, episodes.split(1)[0]
    for name, baseline in baselines.items():
        try:
            baseline(module, one_task, replace(inner, steps=0))
        except UnsupportedSettingError as error:
            if name == BY_HAND:
                raise
            log.warning("%s is left out here: %s", name, error)
        else:
            supporting[name] = baseline
    return supporting


def speed_reference(baselines: Mapping[str, Baseline]) -> str:
    """Return the library whose speed is 1: learn2learn, or the hand-written loop if that is missing."""
    return LEARN2LEARN if LEARN2LEARN in baselines else BY_HAND


def build_methods(
    inner: InnerLoop, baselines: Mapping[str, Baseline], *, orders: Iterable[bool] = (True, False)
) -> list[Method]:
    """Return our engines (in first order only one, as they are the same) and all baselines, in each order."""
    methods = []
    for second_order in orders:
        for engine in ENGINES if second_order else ("unroll",):
            ours = replace(inner, second_order=second_order, engine=engine)
            methods.append(Method(OURS, engine, second_order, partial(_our_step, inner=ours)))
        theirs = replace(inner, second_order=second_order)
        methods += [Method(name, "", second_order, partial(other, inner=theirs)) for name, other in baselines.items()]
    return methods


def _our_step(module: nn.Module, episodes: Episodes, inner: InnerLoop) -> MetaGradient:
    return meta_gradient(*functionalize(module), episodes, inner)


def check_gradients_equal(
    methods: Sequence[Method], module: nn.Module, batches: Sequence[Episodes]
) -> dict[str, float]:
    """Check that all methods compute the same gradient, in float64 and in the float32 that is timed.

    float64 verifies the formulas. In float32 an input of ReLU that lies within rounding of its kink may fall on either
    side of it, and a correct gradient is then off by percents; with max-pooling this happens in every other batch. So
    the smallest over the batches of each method's distance to its own float64 gradient tells rounding from a wrong
    kernel. Where kinks are so many that the hand-written loop exceeds the tolerance (ResNet-12), a method may be four
    times as far, up to 0.1. Each is compared in float64 with the first of its order; the module, of any dtype, is not
    changed.

    Returns:
        ``float64``: the largest relative difference; ``float32``: the largest of the smallest distances.

    Raises:
        DisagreementError: naming the method.
    """
    references: dict[bool, tuple[str, list[Params]]] = {}
    largest = {"float64": 0.0, "float32": 0.0}
    distances: dict[Method, float] = {}
    for method in methods:
        exact = [method.gradient(module, batch, torch.float64) for batch in batches]
        reference, expected = references.setdefault(method.second_order, (method.name, exact))
        difference = max(map(_distance, exact, expected))
        if difference >= _FLOAT64_TOLERANCE:
            raise DisagreementError(
                f"{method.name} differs from {reference} by {difference:.1e} in float64, more than the tolerance of "
                f"{_FLOAT64_TOLERANCE:.0e}: one of them is wrong, and nothing was timed."
            )
        rounded = [method.gradient(module, batch, torch.float32) for batch in batches]
        distances[method] = min(map(_distance, rounded, exact))
        largest = {"float64": max(largest["float64"], difference), "float32": max(distances.values())}
    of_loop = {method.second_order: distance for method, distance in distances.items() if method.library == BY_HAND}
    for method, distance in distances.items():
        loop = of_loop.get(method.second_order, 0.0)
        tolerance = _FLOAT32_TOLERANCE
        if loop >= tolerance:
            tolerance = min(_TIMES_LOOP * loop, _FLOAT32_CEILING)
        if distance >= tolerance:
            raise DisagreementError(
                f"{method.name} in float32 is at least {distance:.1e} from its own float64 gradient in each of "
                f"{len(batches)} batches, more than the tolerance of {tolerance:.0e}; nothing was timed."
            )
    return largest


def _distance(grads: Params, expected: Params) -> float:
    distance = relative_error(grads, expected)
    return math.inf if math.isnan(distance) else distance  # comparisons with NaN are false
