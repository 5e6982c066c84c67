"""Episodes from any Python iterable of tasks: a user's own data, one task at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metalearn.core.types import Episodes

_NAMES = tuple(f.name for f in fields(Episodes))


def batches(tasks: Iterable[Any], size: int) -> Iterator[Episodes]:
    """Stack tasks, as they come, into episodes of ``size`` tasks; the last batch may be smaller.

    Args:
        tasks: each ``(support_x, support_y, query_x, query_y)``, a mapping with those keys or an object with those
            attributes; of tensors or numpy arrays ``[S or Q, ...]``, without the task dimension. The tasks of a batch
            must agree in shapes and types.
        size: T, tasks of a batch.

    Raises:
        TypeError: naming the item that is no task, or what in it is neither tensor nor array.
        ValueError: naming the item and what differs from the first of its batch in shape or type; or if ``size`` is
            below 1.

    Example:
        >>> task = (torch.zeros(5, 3), torch.zeros(5), torch.zeros(9, 3), torch.zeros(9))
        >>> [episodes.tasks for episodes in batches([task] * 5, size=2)]
        [2, 2, 1]
    """
    if size < 1:
        raise ValueError(f"batches: size={size}; it must be at least 1.")
    return _batches(enumerate(tasks), size)


def _batches(numbered: Iterator[tuple[int, Any]], size: int) -> Iterator[Episodes]:
    while some := list(islice(numbered, size)):
        read = [_tensors(number, item) for number, item in some]
        first = some[0][0]
        for number, tensors in enumerate(read[1:], start=first + 1):
            _refuse_another_form(number, tensors, first, read[0])
        yield Episodes(*(torch.stack(column) for column in zip(*read, strict=True)))


def _tensors(number: int, item: Any) -> list[Tensor]:
    """The four tensors of a task, in the order of ``Episodes``."""
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
    return [_tensor(number, name, value) for name, value in zip(_NAMES, values, strict=True)]


def _tensor(number: int, name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if not isinstance(value, np.ndarray):
        raise TypeError(
            f"batches: {name} of item {number} is {type(value).__name__}; it must be a tensor or a numpy array."
        )
    try:
        return torch.from_numpy(value)
    except TypeError as error:  # of strings or objects
        raise TypeError(f"batches: {name} of item {number} is an array that torch cannot take: {error}") from error
    except ValueError:  # negative strides
        return torch.from_numpy(value.copy())


def _refuse_another_form(number: int, tensors: list[Tensor], first: int, of_first: list[Tensor]) -> None:
    for name, tensor, expected in zip(_NAMES, tensors, of_first, strict=True):
        for what, mine, its in (
            ("shape", tuple(tensor.shape), tuple(expected.shape)),
            ("type", tensor.dtype, expected.dtype),
            ("device", tensor.device, expected.device),
        ):
            if mine != its:
                raise ValueError(
                    f"batches: {name} of item {number} has {what} {mine}, and of item {first}, which opens the batch, "
                    f"{its}; the tasks of a batch must agree. Make them alike, or take size=1."
                )
