"""Collate episodes from any Python iterable of tasks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import islice
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from metalearn.core.types import Episodes, Examples, named_leaves

_NAMES = tuple(f.name for f in fields(Episodes))


@overload
def batches(tasks: Iterable[Any], size: int, *, unequal: Literal[False] = False) -> Iterator[Episodes]: ...
@overload
def batches(tasks: Iterable[Any], size: int, *, unequal: Literal[True]) -> Iterator[list[Episodes]]: ...


def batches(tasks: Iterable[Any], size: int, *, unequal: bool = False) -> Iterator[Episodes] | Iterator[list[Episodes]]:
    """Stack tasks in order into episodes of ``size`` tasks; the last batch may be smaller.

    Args:
        tasks: each ``(support_x, support_y, query_x, query_y)``, a mapping with those keys or an object with those
            attributes; tensors or numpy arrays ``[S or Q, ...]``, without the task dimension, or tuples, dictionaries
            or dataclasses of such. The tasks of a batch must agree in shapes, types and devices, unless ``unequal``.
        size: T, tasks of a batch.
        unequal: whether tasks may differ, in shots, queries or ways: a batch is then a list of episodes, which
            ``meta_gradient`` takes, in each those of its tasks that agree. Nothing is padded, so that a model or a loss
            that looks at several examples at once (BatchNorm, prototypes) sees those of the task alone. Errors and
            predictions count the tasks group by group.

    Raises:
        TypeError: if an item is no task, or holds anything but tensors and arrays.
        ValueError: if an item differs from the first of its batch in shape, type or device, or ``size`` is below 1.

    Examples:
        >>> task = (torch.zeros(5, 3), torch.zeros(5), torch.zeros(9, 3), torch.zeros(9))
        >>> [episodes.tasks for episodes in batches([task] * 5, size=2)]
        [2, 2, 1]
        >>> shorter = (torch.zeros(2, 3), torch.zeros(2), torch.zeros(9, 3), torch.zeros(9))
        >>> [[episodes.tasks for episodes in batch] for batch in batches([task, shorter, task], size=3, unequal=True)]
        [[2, 1]]
    """
    if size < 1:
        raise ValueError(f"batches: size={size}; it must be at least 1.")
    chunks = _chunks(enumerate(tasks), size)
    if unequal:
        return ([_stack(group) for group in _groups(chunk)] for chunk in chunks)
    return map(_stack_equal, chunks)


Parts = list[Examples]
"""The four parts of a task, in the order of ``Episodes``."""


def _chunks(numbered: Iterator[tuple[int, Any]], size: int) -> Iterator[dict[int, Parts]]:
    """Yield batches of tasks by their numbers."""
    while chunk := {number: _task_parts(number, item) for number, item in islice(numbered, size)}:
        yield chunk


def _stack_equal(tasks: Mapping[int, Parts]) -> Episodes:
    first = min(tasks)
    for number, parts in tasks.items():
        _check_same_shapes(number, parts, first, tasks[first])
    return _stack(list(tasks.values()))


def _stack(tasks: Sequence[Parts]) -> Episodes:
    return Episodes(*(tree_map(lambda *leaves: torch.stack(leaves), *column) for column in zip(*tasks, strict=True)))


def _groups(tasks: Mapping[int, Parts]) -> Iterable[list[Parts]]:
    """Return those tasks together whose tensors agree in names, shapes, types and devices."""
    groups: dict[Any, list[Parts]] = {}
    for parts in tasks.values():
        key = tuple((name, t.shape, t.dtype, t.device) for name, t in _leaves(parts).items())
        groups.setdefault(key, []).append(parts)
    return groups.values()


def _leaves(parts: Parts) -> dict[str, Tensor]:
    return {name: leaf for part in zip(_NAMES, parts, strict=True) for name, leaf in named_leaves(*part).items()}


def _task_parts(number: int, item: Any) -> Parts:
    """Return the four parts of a task, in the order of ``Episodes``, with arrays as tensors."""
    values: Sequence[Any]
    if isinstance(item, Mapping) and set(_NAMES) <= item.keys():
        values = [item[name] for name in _NAMES]
    elif isinstance(item, Sequence) and len(item) == len(_NAMES):
        values = item
    elif all(name in dir(item) for name in _NAMES):
        values = [getattr(item, name) for name in _NAMES]
    else:
        found = f" with the keys {', '.join(map(str, item))}" if isinstance(item, Mapping) else ""
        found = f" of length {len(item)}" if isinstance(item, Sequence) else found
        raise TypeError(
            f"batches: item {number} is {type(item).__name__}{found} and no task; give ({', '.join(_NAMES)}), or a "
            "mapping or an object with those names."
        )
    parts = []
    for name, value in zip(_NAMES, values, strict=True):
        leaves = iter(named_leaves(name, value).items())
        parts.append(tree_map(lambda _, leaves=leaves: _as_tensor(number, *next(leaves)), value))
    return parts


def _as_tensor(number: int, name: str, value: Any) -> Tensor:
    if isinstance(value, np.ndarray):
        try:
            return torch.from_numpy(np.asarray(value, order="C"))  # torch takes no negative strides
        except TypeError as error:  # of strings or objects
            raise TypeError(f"batches: {name} of item {number} is an array that torch cannot take: {error}") from error
    if not isinstance(value, Tensor):
        raise TypeError(
            f"batches: {name} of item {number} is {type(value).__name__}; it must be a tensor or a numpy array."
        )
    return value


def _check_same_shapes(number: int, parts: Parts, first: int, first_parts: Parts) -> None:
    leaves, first_leaves = _leaves(parts), _leaves(first_parts)
    if leaves.keys() != first_leaves.keys():
        raise ValueError(
            f"batches: item {number} has {', '.join(leaves)}, and item {first}, the first of its batch, "
            f"{', '.join(first_leaves)}; the tasks of a batch must agree."
        )
    for name, tensor in leaves.items():
        expected = first_leaves[name]
        for what, found, wanted in (
            ("shape", tuple(tensor.shape), tuple(expected.shape)),
            ("type", tensor.dtype, expected.dtype),
            ("device", tensor.device, expected.device),
        ):
            if found != wanted:
                raise ValueError(
                    f"batches: {name} of item {number} has {what} {found}, and of item {first}, the first of its "
                    f"batch, {wanted}; the tasks of a batch must agree. Make them equal, or take unequal=True: a batch "
                    "is then a list of episodes."
                )
