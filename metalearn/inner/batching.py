"""A function of one task, computed for T tasks at once by ``torch.vmap``; for one after another where that is wrong.

``vmap`` refuses some models (a branch on a tensor's values, activation checkpointing, a recurrent layer) and takes the
derivative of a few operations wrongly. A loop over tasks takes whatever torch can differentiate, with the same result.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from traceback import walk_tb
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_batchedtensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary

from metalearn.errors import OUT_OF_MEMORY
from metalearn.graph_checks import RUN_AGAIN, nothing_run_again
from metalearn.kernels import stacked_layers
from metalearn.operations import CorrectedOperations, Handler, refuse

log = logging.getLogger(__name__)

_ONE_BY_ONE = WeakIdKeyDictionary()
"""Models that cannot be batched, as keys, so that ``vmap`` is tried once for each."""

_NEVER_ONE_BY_ONE = re.compile(
    rf"{OUT_OF_MEMORY}|accessing `data`|mutate a captured|single memory location|in-place operation|inplace operation"
    "|inplace arithmetic|updated in place"
)
"""What a loop would take and get wrong: a hidden or a lasting change of a tensor."""


def _property(func: Any, tensor: Tensor) -> Any:
    """Tell a model that asks whether a batched tensor requires a gradient; torch says no."""
    if func != Tensor.requires_grad.__get__:  # type: ignore[attr-defined]
        return func(tensor)
    while is_batchedtensor(tensor):
        tensor = get_unwrapped(tensor)
    return func(tensor)


_WRONG_AFTER_VMAP: dict[str, Handler] = {
    **dict.fromkeys(
        ("as_strided", "as_strided_", "as_strided_copy", "select_scatter"),
        refuse("its derivative is wrong under torch.vmap"),
    ),
    "register_hook": refuse("torch.vmap never calls a hook"),
    "__get__": _property,
}


def is_batchable(model: object) -> bool:
    """Return whether nothing is known against batching this model by ``torch.vmap``."""
    return model not in _ONE_BY_ONE


def over_tasks(function: Callable[..., Any], *stacked: Any, model: object) -> Any:
    """Compute a function of one task for all of them; differentiable.

    Dropout draws a mask for every task.

    Args:
        function: from one task's tensors, alone or in dictionaries, to tensors.
        stacked: as the function's arguments, each tensor ``[T, ...]``.
        model: what the function calls, remembered if it cannot be batched.

    Returns:
        What the function returns, each tensor ``[T, ...]``.
    """
    if not is_batchable(model):
        return _one_by_one(function, stacked)
    try:
        with differentiable_layers(_WRONG_AFTER_VMAP):
            return torch.vmap(function, randomness="different")(*stacked)
    except (RuntimeError, AssertionError) as error:
        if any(
            frame.f_globals.get("__name__") == "torch.utils.checkpoint" for frame, _ in walk_tb(error.__traceback__)
        ):
            raise ValueError(RUN_AGAIN) from error
        if _NEVER_ONE_BY_ONE.search(str(error)):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
    # Out here, as the error's trace would keep the failed attempt's activations.
    result = _one_by_one(function, stacked)
    with suppress(TypeError):  # of what has no weak references: it is tried again
        _ONE_BY_ONE[model] = True
    log.warning(
        "The model or the loss cannot be batched over tasks by torch.vmap (%.300s), so that tasks are computed one "
        "after another: as exact, and slower.",
        reason,
    )
    return result


def _one_by_one(function: Callable[..., Any], stacked: tuple[Any, ...]) -> Any:
    leaves, spec = tree_flatten(stacked)
    # Copies, laid out as a task's own tensors would be: a model may look at strides, or write.
    tasks = [[leaf[t].clone(memory_format=torch.contiguous_format) for leaf in leaves] for t in range(len(leaves[0]))]
    with differentiable_layers():
        by_task = [function(*tree_unflatten(own, spec)) for own in tasks]
    return tree_map(lambda *own: torch.stack(own), *by_task)


@contextmanager
def differentiable_layers(wrong: Mapping[str, Handler] | None = None) -> Iterator[None]:
    """Enter what every forward pass is computed in: attention by its formula, as fused kernels have no second
    derivative and on CPUs no batching rule; corrected operations; and the kernels for stacked layers.

    Raises:
        ValueError: if activations are checkpointed inside.
    """
    with nothing_run_again(), sdpa_kernel(SDPBackend.MATH), CorrectedOperations(wrong or {}), stacked_layers():
        yield
