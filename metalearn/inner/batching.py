"""A function of one task, computed for T tasks at once by ``torch.vmap``; for one after another where that is wrong.

``vmap`` refuses some models (a branch on a tensor's values, a recurrent layer, a boolean mask) and takes the derivative
of a few operations wrongly. A loop over tasks takes whatever torch can differentiate, with the same result.
"""

from __future__ import annotations

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
from metalearn.inner.diagnostics import is_of_torch
from metalearn.models.kernels import STACKED_LAYERS

log = logging.getLogger(__name__)

_ONE_BY_ONE = WeakIdKeyDictionary()
"""Models that cannot be batched, each with the losses that it cannot be batched with; itself, where there is none."""

_NEVER_ONE_BY_ONE = re.compile(
    rf"{OUT_OF_MEMORY}|accessing `data`|mutate a captured|single memory location|in-place operation|inplace operation"
    "|inplace arithmetic|updated in place"
)
"""What a loop would take and get wrong: a hidden or a lasting change of a tensor."""


def is_batchable(model: object, loss: object = None) -> bool:
    """Return whether nothing is known against batching a model, or a model and a loss, by ``torch.vmap``."""
    return (loss or model) not in _ONE_BY_ONE.get(model, ())


def over_tasks(function: Callable[..., Any], *stacked: Any, model: object, loss: object = None) -> Any:
    """Compute a function of one task for all of them; differentiable.

    Dropout draws a mask for every task.

    Args:
        function: from one task's tensors, alone or in dictionaries, to tensors.
        stacked: as the function's arguments, each tensor ``[T, ...]``.
        model: what the function calls, remembered if it cannot be batched.
        loss: that the function calls as well.

    Returns:
        What the function returns, each tensor ``[T, ...]``.

    Raises:
        ValueError: if the model checkpoints activations.
    """
    if not is_batchable(model, loss):
        return _one_by_one(function, stacked)
    on_gpus = [leaf for leaf in tree_leaves(stacked) if isinstance(leaf, Tensor) and leaf.is_cuda]
    capturing = bool(on_gpus) and torch.cuda.is_current_stream_capturing()  # into a CUDA graph, of what has run before
    devices, states = ([], []) if capturing else get_device_states(*on_gpus)
    cpu_state = torch.get_rng_state()
    try:
        with differentiable_layers(), _no_batched_tensor_left(model):
            return torch.vmap(function, randomness="different")(*stacked)
    except (RuntimeError, AssertionError) as error:
        if any(
            frame.f_globals.get("__name__") == "torch.utils.checkpoint" for frame, _ in walk_tb(error.__traceback__)
        ):
            raise ValueError(ACTIVATION_CHECKPOINT_ERROR) from error
        own = not (isinstance(error, NotImplementedError) or is_of_torch(error))
        if own or _NEVER_ONE_BY_ONE.search(str(error)):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
    # Out here, as the error's trace would keep the failed attempt's activations. It has drawn random numbers, which are
    # drawn again: engines that take a step again begin it with the generators as they are now.
    torch.set_rng_state(cpu_state)
    set_device_states(devices, states)
    result = _one_by_one(function, stacked)
    with suppress(TypeError):  # of what has no weak references: it is tried again
        _ONE_BY_ONE.setdefault(model, WeakIdKeyDictionary())[loss or model] = True
    _say_once(type(getattr(model, "module", model)), reason)
    return result


def _say_once(kind: type, reason: str) -> None:
    if (kind, reason) in _SAID:
        return
    _SAID.add((kind, reason))
    log.warning(
        "The model or the loss cannot be batched over tasks by torch.vmap (%s: %.300s), so that tasks are computed one "
        "after another: as exact, and slower.",
        kind.__qualname__,
        reason,
    )


_SAID: set[tuple[type, str]] = set()


@contextmanager
def _no_batched_tensor_left(model: object) -> Iterator[None]:
    """Put back what a module keeps of a pass, where it is a tensor that means nothing outside of ``vmap``."""
    module = getattr(model, "module", None)
    modules = list(module.modules()) if isinstance(module, nn.Module) else []
    kept = [dict(vars(m)) for m in modules]
    yield
    for m, before in zip(modules, kept, strict=True):
        for name, value in list(vars(m).items()):
            if isinstance(value, Tensor) and value is not before.get(name) and is_batchedtensor(value):
                vars(m).pop(name)
                vars(m).update({name: before[name]} if name in before else {})


def _one_by_one(function: Callable[..., Any], stacked: tuple[Any, ...]) -> Any:
    leaves, spec = tree_flatten(stacked)
    # Copies, laid out as a task's own tensors would be: a model may look at strides, or write.
    tasks = [[leaf[t].clone(memory_format=torch.contiguous_format) for leaf in leaves] for t in range(len(leaves[0]))]
    with differentiable_layers():
        by_task = [function(*tree_unflatten(own, spec)) for own in tasks]
    return tree_map(lambda *own: torch.stack(own), *by_task)


@contextmanager
def differentiable_layers() -> Iterator[None]:
    """Enter what every forward pass is computed in: attention by its formula, as fused kernels have no second
    derivative and on CPUs no batching rule; corrected operations; and the kernels for stacked layers.

    Raises:
        ValueError: if activations are checkpointed inside, or running statistics written.
    """
    operations = CorrectedOperations(STATELESS, kernels=STACKED_LAYERS)
    with forbid_activation_checkpointing(), sdpa_kernel(SDPBackend.MATH), operations:
        yield
