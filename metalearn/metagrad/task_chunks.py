"""Split the tasks of a meta-gradient into passes, and take the mean over them.

On a CPU, stacking tasks saves the time of starting operations, until their results no longer fit into the caches. So by
default a pass takes as many tasks as keep the largest result of an operation on images, in a support pass of the model,
within ``_LARGEST_RESULT_BYTES``: at 5-way 1-shot, 33 tasks of a convolution network with stride 2; at 5-way 5-shot with
max-pooling one. On a GPU a pass takes all tasks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from metalearn.core.errors import NonFiniteLossError, is_out_of_memory
from metalearn.core.params import expand_over_tasks
from metalearn.core.threads import one_thread_at_a_time
from metalearn.core.types import Episodes, Examples, Forward, MetaGradient, Params
from metalearn.inner import InnerLoop, meta_params_at_step
from metalearn.inner.losses import forward_over_tasks

_LARGEST_RESULT_BYTES = 8 * 2**20
"""Measured with 4 to 32 tasks a pass on one and on two cores; half of it or twice as much takes up to 10% longer."""

_MEASURED = WeakIdKeyDictionary()
"""Models, each with the bytes of its largest result by the shape and type of a task's support images."""


def tasks_per_pass(
    forward: Forward, params: Params, episodes: Episodes, inner: InnerLoop, *, engine: object = None
) -> int:
    """Return ``inner.task_chunk``, or without one the number of tasks that is fast on the device.

    An ``engine`` that replaces the named one may need all tasks at once, and is given them.
    """
    takes_all = engine is not None or episodes.device.type != "cpu" or episodes.tasks == 1
    if inner.task_chunk is not None or takes_all:
        return min(inner.task_chunk or episodes.tasks, episodes.tasks)
    most = max(
        1, _LARGEST_RESULT_BYTES // max(1, _largest_result(forward, params, episodes.split(1)[0].support_x, inner))
    )
    return math.ceil(episodes.tasks / math.ceil(episodes.tasks / most))  # passes of nearly the same size


def mean_over_passes(
    compute: Callable[[Episodes], MetaGradient], params: Params, groups: Sequence[Episodes], sizes: Sequence[int]
) -> MetaGradient:
    """Compute the mean over tasks, diagnostics included, and the predictions of each group of tasks.

    Args:
        compute: of one pass.
        params: meta-parameters.
        groups: tasks; the sets of a group are of the same size.
        sizes: how many tasks of each group a pass takes.
    """
    if len(groups) == 1 and sizes[0] >= groups[0].tasks:
        result = compute(groups[0])
        return replace(result, predictions=[result.predictions])
    grads = {name: torch.zeros_like(p, requires_grad=False) for name, p in params.items()}
    losses, support_losses = [], []
    predictions: list[list[Examples]] = [[] for _ in groups]
    total_tasks = sum(group.tasks for group in groups)
    diagnostics: dict[str, Tensor] = {}
    tasks_done = 0
    passes = [
        (of_group, chunk)
        for of_group, group, size in zip(predictions, groups, sizes, strict=True)
        for chunk in group.split(size)
    ]
    for of_group, chunk in passes:
        share = chunk.tasks / total_tasks
        try:
            result = compute(chunk)
        except NonFiniteLossError as error:
            raise error.with_task_offset(tasks_done) from None
        tasks_done += chunk.tasks
        for name, total in grads.items():
            total.add_(result.grads[name], alpha=share)
        losses.append(share * result.loss)
        support_losses.append(share * result.support_loss)
        of_group.append(result.predictions)
        for name, value in result.diagnostics.items():
            if name.endswith("_max"):
                diagnostics[name] = torch.maximum(diagnostics.get(name, value), value)
            else:
                diagnostics[name] = diagnostics.get(name, 0) + share * value
    return MetaGradient(
        loss=torch.stack(losses).sum(),
        grads=grads,
        predictions=[tree_map(lambda *parts: torch.cat(parts), *of_group) for of_group in predictions],
        support_loss=torch.stack(support_losses).sum(dim=0),
        diagnostics=diagnostics,
    )


class _LargestResult(TorchDispatchMode):
    """Context that notes the bytes of the largest result of an operation that depends on more than the parameters."""

    def __init__(self, params: Params) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # not annotated in torch
        self.bytes = 0
        self._of_params = WeakIdKeyDictionary()
        self._of_params.update(dict.fromkeys(params.values(), True))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs, results = _tensors((args, kwargs)), _tensors(out)
        if inputs and all(tensor in self._of_params for tensor in inputs):
            for tensor in results:
                self._of_params[tensor] = True
        else:
            self.bytes = max((self.bytes, *(tensor.numel() * tensor.element_size() for tensor in results)))
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _largest_result(forward: Forward, params: Params, support_x: Examples, inner: InnerLoop) -> int:
    """Return the bytes of the largest result in the model's pass over one task, ``[1, examples, ...]``.

    0 if the pass fails, which the meta-gradient will explain; memory that runs out is raised here.
    """
    by_shape = _MEASURED.setdefault(getattr(forward, "module", forward), {})
    key = tuple((leaf.shape, leaf.dtype) for leaf in tree_leaves(support_x))
    if key not in by_shape:
        theta = meta_params_at_step({name: p.detach() for name, p in params.items()}, inner)
        largest = _LargestResult(theta)
        try:
            with one_thread_at_a_time(), torch.random.fork_rng(devices=[]), largest:
                forward_over_tasks(forward, expand_over_tasks(theta, tasks=1), tree_map(Tensor.detach, support_x))
        except Exception as error:  # whatever else a model raises, it raises again
            if is_out_of_memory(error):
                raise
            largest.bytes = 0
        by_shape[key] = largest.bytes
    return int(by_shape[key])
