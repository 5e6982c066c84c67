"""Tensors beside theta that are meta-learned: of the loss, the model or the update rule, which take them by name.

They are parameters that no inner step changes, under names of their own, so that every engine differentiates through
them as it does through a shared layer: with a mixed second derivative where they appear in the inner gradient.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from metalearn.core.params import check_params, expand_over_tasks
from metalearn.core.types import Forward, Loss, Params
from metalearn.inner.config import InnerLoop

_PREFIX = "meta/"


def merge_meta(params: Params, meta: Params | None) -> Params:
    """Return theta with the meta-learned tensors.

    Raises:
        ValueError: if a parameter has a name of that kind.
    """
    if wrong := [name for name in params if is_meta(name)]:
        raise ValueError(f"params: {wrong[0]!r} begins with {_PREFIX!r}, as meta-learned tensors do; rename the layer.")
    return params | _prefixed(meta or {})


def _prefixed(meta: Params) -> Params:
    return {f"{_PREFIX}{name}": w for name, w in meta.items()}


def is_meta(name: str) -> bool:
    """Return whether an entry is a meta-learned tensor."""
    return name.startswith(_PREFIX)


def split_meta(params: Params) -> tuple[Params, Params]:
    """Return the model's own entries, and the meta-learned tensors by the names that they were given."""
    meta = {name.removeprefix(_PREFIX): w for name, w in params.items() if is_meta(name)}
    return ({name: w for name, w in params.items() if not is_meta(name)}, meta) if meta else (params, meta)


def with_meta(fast: Params, meta: Params | None) -> Params:
    """Return stacked parameters ``[T, ...]`` with the meta-learned tensors, the same for every task."""
    if not meta:
        return fast
    tasks = next(iter(fast.values())).shape[0]
    return fast | expand_over_tasks(_prefixed(meta), tasks)


def taken_by(function: Callable[..., Any], meta: Params | None) -> Params:
    """Return those of the tensors that a model, a loss or a rule has arguments for.

    That is by name, after its first two. ``**kwargs`` take none, nor do torch's own functions and layers, whose
    arguments are settings: ``weight`` of ``cross_entropy`` is given by a function of one's own.
    """
    if not meta:
        return {}
    function = getattr(function, "signature_of", function)
    function = function.forward if isinstance(function, nn.Module) else function
    inner = function.func if isinstance(function, functools.partial) else function
    if str(getattr(inner, "__module__", "")).startswith("torch."):
        return {}
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # of a builtin function
        return {}
    by_place = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][:2]
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p not in by_place}
    return {name: w for name, w in meta.items() if name in names}


def check_meta(
    meta: Params | None, forward: Forward, loss: Loss, query_loss: Loss, inner: InnerLoop, *, own_engine: bool
) -> None:
    """Check meta-learned tensors, that something takes each, and that it has a gradient.

    Args:
        meta: the tensors.
        forward: may take them, as may the other functions.
        loss: of the support set.
        query_loss: of the query set.
        inner: whose rule may take them.
        own_engine: whether an engine is given, which knows itself what it has a gradient for.

    Raises:
        TypeError: if ``meta`` is no dictionary of floating-point tensors.
        ValueError: naming a tensor that nothing takes, or that has no gradient in first order.
    """
    if not meta:
        return
    check_params(meta, name="meta")
    elsewhere = taken_by(forward, meta) | taken_by(query_loss, meta) | taken_by(inner.rule.update, meta)
    by_support = taken_by(loss, meta)
    for name in meta:
        if name not in elsewhere | by_support:
            raise ValueError(
                f"meta: nothing takes {name!r}. Give the loss, the model's forward or the rule's update an argument "
                f"of that name, after its first two: def loss(prediction, y, {name}). Functions of torch take none."
            )
        if name not in elsewhere and not inner.second_order and not own_engine and inner.steps:
            raise ValueError(
                f"meta: the support loss alone takes {name!r}, and first order has no gradient there, as it takes the "
                "inner gradients as constants. Take second_order=True."
            )
