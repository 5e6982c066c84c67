"""Compute a function of one task for T tasks by ``torch.vmap``, or in a loop where ``vmap`` would fail or be wrong.

``vmap`` cannot batch some models (a branch on a tensor's values, a boolean mask) and takes the
derivative of a few operations wrongly. A loop over tasks takes all that torch can differentiate, with the same result.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from traceback import walk_tb
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_batchedtensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.checkpoint import get_device_states, set_device_states
from torch.utils.weak import WeakIdKeyDictionary

from metalearn.core.errors import OUT_OF_MEMORY
from metalearn.core.graph_checks import ACTIVATION_CHECKPOINT_ERROR, forbid_activation_checkpointing
from metalearn.core.operations import STATELESS, CorrectedOperations
from metalearn.core.threads import one_thread_at_a_time
from metalearn.models.kernels import STACKED_LAYERS

log = logging.getLogger(__name__)

_UNBATCHABLE = WeakIdKeyDictionary()
"""Models that cannot be batched, each with the losses that it cannot be batched with, or with itself without a loss."""

_NEVER_RETRIED = re.compile(
    rf"{OUT_OF_MEMORY}|accessing `data`|mutate a captured|single memory location|in-place operation|inplace operation"
    "|inplace arithmetic|updated in place|Failed to find C compiler"
)
"""Errors that a loop would hide or get wrong: of the machine, or a hidden or a lasting change of a tensor."""


def is_batchable(model: object, loss: object = None) -> bool:
    """Return whether ``torch.vmap`` has not failed yet for a model, or a model and a loss."""
    return (loss or model) not in _UNBATCHABLE.get(model, ())


@one_thread_at_a_time()
def over_tasks(function: Callable[..., Any], *stacked: Any, model: object, loss: object = None) -> Any:
    """Compute a function of one task for all tasks; differentiable. Dropout draws a mask for every task.

    Args:
        function: from one task's tensors, alone or in dictionaries, to tensors; its results are stacked, ``[T, ...]``.
        stacked: the function's arguments, each tensor ``[T, ...]``.
        model: that the function calls, remembered if it cannot be batched.
        loss: that the function calls as well.

    Raises:
        ValueError: if the model checkpoints activations.
    """
    if not is_batchable(model, loss):
        return _loop_over_tasks(function, stacked)
    on_gpus = [leaf for leaf in tree_leaves(stacked) if isinstance(leaf, Tensor) and leaf.is_cuda]
    capturing = bool(on_gpus) and torch.cuda.is_current_stream_capturing()  # a CUDA graph of what has run before
    devices, states = ([], []) if capturing else get_device_states(*on_gpus)
    cpu_state = torch.get_rng_state()
    try:
        with differentiable_layers(), _restore_batched_attributes(model):
            return torch.vmap(function, randomness="different")(*stacked)
    except (RuntimeError, AssertionError) as error:
        modules = {frame.f_globals.get("__name__") for frame, _ in walk_tb(error.__traceback__)}
        if "torch.utils.checkpoint" in modules:
            raise ValueError(ACTIVATION_CHECKPOINT_ERROR) from error
        if isinstance(error, (RecursionError, torch.AcceleratorError)) or _NEVER_RETRIED.search(str(error)):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
    # Outside of the except block, as the error's trace would keep the failed attempt's activations. The attempt has
    # drawn random numbers: rewind, as engines that recompute a step start it with the generators as they are now.
    torch.set_rng_state(cpu_state)
    set_device_states(devices, states)
    result = _loop_over_tasks(function, stacked)
    with suppress(TypeError):  # a model without weak references is tried again each time
        _UNBATCHABLE.setdefault(model, WeakIdKeyDictionary())[loss or model] = True
    kind: Any = type(getattr(model, "module", model))  # mypy takes a class for not hashable
    _warn_once(kind, reason)
    return result


@functools.cache
def _warn_once(kind: type, reason: str) -> None:
    log.warning(
        "The model or the loss cannot be batched over tasks by torch.vmap (%s: %.300s), so that tasks are computed one "
        "after another: as exact, and slower.",
        kind.__qualname__,
        reason,
    )


@contextmanager
def _restore_batched_attributes(model: object) -> Iterator[None]:
    """Restore attributes to which a module assigned a batched tensor, which has no meaning outside of ``vmap``."""
    module = getattr(model, "module", None)
    modules = list(module.modules()) if isinstance(module, nn.Module) else []
    saved = [dict(vars(m)) for m in modules]
    yield
    for m, before in zip(modules, saved, strict=True):
        for name, value in list(vars(m).items()):
            if isinstance(value, Tensor) and value is not before.get(name) and is_batchedtensor(value):
                vars(m).pop(name)
                vars(m).update({name: before[name]} if name in before else {})


def _loop_over_tasks(function: Callable[..., Any], stacked: tuple[Any, ...]) -> Any:
    leaves, spec = tree_flatten(stacked)
    # Contiguous copies: a model may look at strides, or write.
    tasks = [[leaf[t].clone(memory_format=torch.contiguous_format) for leaf in leaves] for t in range(len(leaves[0]))]
    with differentiable_layers():
        results = [function(*tree_unflatten(task, spec)) for task in tasks]
    return tree_map(lambda *tensors: torch.stack(tensors), *results)


@contextmanager
def differentiable_layers() -> Iterator[None]:
    """Make every layer inside twice differentiable and batchable.

    Attention is computed by its formula, as fused kernels have no second derivative and on CPUs no batching rule;
    operations with wrong derivatives are corrected; stacked layers use the task kernels.

    Raises:
        ValueError: if activations are checkpointed inside, or running statistics written.
    """
    operations = CorrectedOperations(STATELESS, kernels=STACKED_LAYERS)
    with one_thread_at_a_time(), forbid_activation_checkpointing(), sdpa_kernel(SDPBackend.MATH), operations:
        yield
