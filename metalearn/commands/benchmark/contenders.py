"""Who is compared: this project's engines, a hand-written loop, and other libraries; and that all compute the same."""

from __future__ import annotations

import copy
import logging
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from metalearn.core.errors import RunError
from metalearn.core.functional import functionalize, relative_error
from metalearn.core.types import Episodes, MetaGradient, Params
from metalearn.inner import InnerLoop
from metalearn.metagrad import ENGINES, meta_gradient
from metalearn.metagrad.baselines import by_hand
from metalearn.metagrad.baselines.common import Peer, installed_peers

log = logging.getLogger(__name__)

OURS, BY_HAND, LEARN2LEARN = "metalearn", "hand-written loop", "learn2learn"

BATCHES, TASKS_COMPARED = 5, 2
"""On how many draws contenders are compared, and of how many tasks each."""

_FLOAT64_BOUND = 1e-9
_FLOAT32_BOUND = 1e-4


class DisagreementError(RunError):
    """Contenders that do not compute the same thing, so that their times cannot be compared."""


@dataclass(frozen=True)
class Method:
    """A way to compute the meta-gradient of a module."""

    library: str
    engine: str
    second_order: bool
    step: Callable[[nn.Module, Episodes], MetaGradient]

    @property
    def who(self) -> str:
        """Library and engine."""
        return f"{self.library} {self.engine}".strip()

    @property
    def name(self) -> str:
        """As it stands in tables and messages."""
        return f"{self.who}, {order_name(self.second_order)}"

    def gradient(self, module: nn.Module, episodes: Episodes, dtype: torch.dtype) -> Params:
        """The meta-gradient of a copy of the module, on the same tasks, all in one precision."""
        tasks = Episodes(episodes.support_x.to(dtype), episodes.support_y, episodes.query_x.to(dtype), episodes.query_y)
        return {name: g.clone() for name, g in self.step(copy.deepcopy(module).to(dtype), tasks).grads.items()}


def order_name(second_order: bool) -> str:
    """In words."""
    return "second order" if second_order else "first order"


def available_baselines() -> dict[str, Peer]:
    """The hand-written loop and the libraries that are installed; a warning says which are not."""
    found, missing = installed_peers()
    for name, why in missing.items():
        log.warning(
            "%s is left out: %s. To have it compared, install it with `pip install -r requirements-peers.txt`.",
            *(name, why),
        )
    return {BY_HAND: by_hand.meta_gradient, **found}


def baseline(peers: Mapping[str, Peer]) -> str:
    """Whose speed others are given in units of: learn2learn, and where that is missing the hand-written loop."""
    return LEARN2LEARN if LEARN2LEARN in peers else BY_HAND


def build_methods(
    inner: InnerLoop, peers: Mapping[str, Peer], *, orders: Iterable[bool] = (True, False)
) -> list[Method]:
    """Ours, with every engine in second order, as they are all the same in first; then all others; in each order.

    Args:
        inner: its order and engine are replaced.
        peers: by name.
        orders: ``True`` is second order.
    """
    found = []
    for second_order in orders:
        for engine in ENGINES if second_order else ("unroll",):
            ours = replace(inner, second_order=second_order, engine=engine)
            found.append(Method(OURS, engine, second_order, partial(_of_module, inner=ours)))
        theirs = replace(inner, second_order=second_order)
        found += [Method(name, "", second_order, partial(_of_peer, peer, theirs)) for name, peer in peers.items()]
    return found


def _of_module(module: nn.Module, episodes: Episodes, *, inner: InnerLoop) -> MetaGradient:
    return meta_gradient(*functionalize(module), episodes, inner)


def _of_peer(peer: Peer, inner: InnerLoop, module: nn.Module, episodes: Episodes) -> MetaGradient:
    return peer(module, episodes, inner)


def check_gradients_equal(found: Sequence[Method], module: nn.Module, batches: Sequence[Episodes]) -> dict[str, float]:
    """Refuse to time contenders that do not compute the same thing: in float64, and in the float32 that is timed.

    float64 proves the formulas. In float32 an input of ReLU that lies within rounding of its kink may fall on either
    side of it, and a right gradient is then percents away; in most draws none does. So the median over the batches of
    each contender's distance to its own float64 gradient tells rounding from a kernel that is wrong.

    Args:
        found: each is held against the first of its order in float64.
        module: of any precision; it stays as it is.
        batches: the tasks of each draw.

    Returns:
        ``float64``: the largest relative difference; ``float32``: the largest median distance.

    Raises:
        DisagreementError: naming the contender.
    """
    references: dict[bool, tuple[str, list[Params]]] = {}
    largest = {"float64": 0.0, "float32": 0.0}
    for contender in found:
        exact = [contender.gradient(module, batch, torch.float64) for batch in batches]
        reference, expected = references.setdefault(contender.second_order, (contender.name, exact))
        difference = max(map(_distance, exact, expected))
        if difference >= _FLOAT64_BOUND:
            raise DisagreementError(
                f"{contender.name} differs from {reference} by {difference:.1e} in float64 and may by "
                f"{_FLOAT64_BOUND:.0e}: one of them is wrong, and nothing was timed."
            )
        rounded = [contender.gradient(module, batch, torch.float32) for batch in batches]
        distance = statistics.median(map(_distance, rounded, exact))
        if distance >= _FLOAT32_BOUND:
            raise DisagreementError(
                f"{contender.name} in float32 is {distance:.1e} from its own float64 gradient, in the median of "
                f"{len(batches)} batches, and may be by {_FLOAT32_BOUND:.0e}: more than rounding; nothing was timed."
            )
        largest = {"float64": max(largest["float64"], difference), "float32": max(largest["float32"], distance)}
    return largest


def _distance(got: Params, expected: Params) -> float:
    distance = relative_error(got, expected)
    return math.inf if math.isnan(distance) else distance  # NaN compares with nothing


def refuse_failed(failed: Mapping[str, Exception], settings: int) -> None:
    """End a benchmark of which some settings could not be timed, after the others were.

    Args:
        failed: why, by the setting's name.
        settings: how many there were.

    Raises:
        RunError: if any has failed.
    """
    if failed:
        why = "\n".join(f"{name}: {error}" for name, error in failed.items())
        raise RunError(f"{len(failed)} of {settings} settings could not be timed; the others are written.\n{why}")
