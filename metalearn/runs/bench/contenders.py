"""Who is compared: this project's engines, a hand-written loop, and other libraries; and that all compute the same."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from metalearn.errors import RunError
from metalearn.inner import InnerLoop
from metalearn.metagrad import ENGINES, meta_gradient
from metalearn.params import functionalize, relative_error
from metalearn.peers import by_hand
from metalearn.peers.installed import Peer, installed_peers
from metalearn.types import Episodes, MetaGradient, Params

log = logging.getLogger(__name__)

OURS, BY_HAND, LEARN2LEARN = "metalearn", "hand-written loop", "learn2learn"

_BOUNDS = {
    torch.float64: 1e-9,
    torch.float32: 1e-2,
}  # the first proves formulas, the other finds kernels that are wrong
_TASKS_COMPARED = 2


@dataclass(frozen=True)
class Contender:
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


def order_name(second_order: bool) -> str:
    """In words."""
    return "second order" if second_order else "first order"


def find_peers() -> dict[str, Peer]:
    """The hand-written loop and the libraries that are installed; a warning says which are not."""
    found, missing = installed_peers()
    for name, why in missing.items():
        log.warning(
            "%s is left out: %s. To have it compared, install it with `pip install -r requirements-peers.txt`.",
            *(name, why),
        )
    return {BY_HAND: by_hand.meta_gradient, **found}


def yardstick(peers: Mapping[str, Peer]) -> str:
    """Whose speed others are given in units of: learn2learn, and where that is missing the hand-written loop."""
    return LEARN2LEARN if LEARN2LEARN in peers else BY_HAND


def contenders(
    inner: InnerLoop, peers: Mapping[str, Peer], *, orders: Iterable[bool] = (True, False)
) -> list[Contender]:
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
            found.append(Contender(OURS, engine, second_order, partial(_of_module, inner=ours)))
        theirs = replace(inner, second_order=second_order)
        found += [Contender(name, "", second_order, partial(_of_peer, peer, theirs)) for name, peer in peers.items()]
    return found


def _of_module(module: nn.Module, episodes: Episodes, *, inner: InnerLoop) -> MetaGradient:
    return meta_gradient(*functionalize(module), episodes, inner)


def _of_peer(peer: Peer, inner: InnerLoop, module: nn.Module, episodes: Episodes) -> MetaGradient:
    return peer(module, episodes, inner)


def check_equal(found: Sequence[Contender], module: nn.Module, episodes: Episodes) -> dict[str, float]:
    """Refuse to time contenders that do not compute the same thing: in float64, and in the float32 that is timed.

    Args:
        found: each is held against the first of its order.
        module: of any precision; it stays as it is.
        episodes: of which two tasks are taken.

    Returns:
        The largest relative difference in each precision, by its name.

    Raises:
        RunError: naming the contender that differs.
    """
    return {str(dtype).removeprefix("torch."): _difference(found, module, episodes, dtype) for dtype in _BOUNDS}


def _difference(found: Sequence[Contender], module: nn.Module, episodes: Episodes, dtype: torch.dtype) -> float:
    converted = copy.deepcopy(module).to(dtype)
    few = episodes.split(_TASKS_COMPARED)[0]
    tasks = Episodes(few.support_x.to(dtype), few.support_y, few.query_x.to(dtype), few.query_y)
    references: dict[bool, tuple[str, Params]] = {}
    worst = 0.0
    for contender in found:
        grads = {name: g.clone() for name, g in contender.step(converted, tasks).grads.items()}
        reference, expected = references.setdefault(contender.second_order, (contender.name, grads))
        difference = relative_error(grads, expected)
        if not difference < _BOUNDS[dtype]:
            raise RunError(
                f"{contender.name} differs from {reference} by {difference:.1e} in {str(dtype).removeprefix('torch.')} "
                f"and may by {_BOUNDS[dtype]:.0e}; nothing was timed."
            )
        worst = max(worst, difference)
    return worst
