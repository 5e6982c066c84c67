"""Tensors beside theta that are meta-learned: of the loss, the model or the update rule, which take them by name.

They are parameters that no inner step changes, under names of their own, so that every engine differentiates through
them as it does through a shared layer: with a mixed second derivative where they appear in the inner gradient.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from metalearn.core.functional import check_params, expand_over_tasks
from metalearn.core.types import Params
from metalearn.inner.config import InnerLoop

_PREFIX = "meta/"


def merge_meta(params: Params, inner: InnerLoop, meta: Params | None) -> tuple[Params, InnerLoop]:
    """Return theta with the meta-learned tensors, and the inner loop that adapts what it did without them."""
    if meta is None:
        return params, inner
    names = inner.adapted_params if inner.adapted_params is not None else frozenset(params)
    return params | {f"{_PREFIX}{name}": w for name, w in meta.items()}, replace(inner, adapted_params=names)


def split_meta(params: Params) -> tuple[Params, Params]:
    """Return the model's own entries, and the meta-learned tensors by the names that they were given."""
    meta = {name.removeprefix(_PREFIX): w for name, w in params.items() if name.startswith(_PREFIX)}
    return ({name: w for name, w in params.items() if not name.startswith(_PREFIX)}, meta) if meta else (params, meta)


def with_meta(fast: Params, meta: Params | None) -> Params:
    """Return stacked parameters ``[T, ...]`` with the meta-learned tensors, the same for every task."""
    if not meta:
        return fast
    tasks = next(iter(fast.values())).shape[0]
    return fast | expand_over_tasks({f"{_PREFIX}{name}": w for name, w in meta.items()}, tasks)


def taken_by(function: Callable[..., Any], meta: Params) -> Params:
    """Return those of the tensors that a model, a loss or a rule takes by name."""
    if not meta:
        return meta
    names = _keywords(getattr(function, "signature_of", function))
    return meta if names is None else {name: w for name, w in meta.items() if name in names}


def check_meta(meta: Params | None, *functions: Callable[..., Any]) -> None:
    """Check meta-learned tensors, and that one of the functions takes each.

    Raises:
        TypeError: if ``meta`` is no dictionary of floating-point tensors.
        ValueError: naming a tensor that nothing takes.
    """
    if meta is None:
        return
    check_params(meta, name="meta")
    for name, w in meta.items():
        if not any(taken_by(function, {name: w}) for function in functions):
            raise ValueError(
                f"meta: nothing takes {name!r}. Give the loss, the model's forward or the rule's update an argument "
                f"of that name: def loss(prediction, y, {name})."
            )


@functools.lru_cache(maxsize=256)
def _keywords(function: Callable[..., Any]) -> frozenset[str] | None:
    """Return the names of arguments that a function takes by keyword; ``None`` if it takes any."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of a builtin function
        return frozenset()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
