"""Any iterable of tasks becomes episodes, and a task that does not fit raises."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from metalearn.data.collate import batches

NAMES = ("support_x", "support_y", "query_x", "query_y")


def task(number: int, *, shots: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.full((shots, 3), float(number)),
        torch.arange(shots),
        torch.full((4, 3), number + 0.5),
        torch.arange(4),
    )


def test_batches_stack_tasks_in_order() -> None:
    found = list(batches((task(i) for i in range(5)), 2))
    assert [episodes.tasks for episodes in found] == [2, 2, 1]
    assert torch.cat([episodes.support_x[:, 0, 0] for episodes in found]).tolist() == [0, 1, 2, 3, 4]
    assert found[0].query_y.shape == (2, 4)
    assert found[0].query_y.dtype == torch.int64
    assert list(batches([], 3)) == []


@pytest.mark.parametrize(
    "form",
    [
        lambda t: t,
        list,
        lambda t: dict(zip(NAMES, t, strict=True)),
        lambda t: SimpleNamespace(**dict(zip(NAMES, t, strict=True))),
        lambda t: tuple(part.numpy() for part in t),
        lambda t: tuple(part.numpy()[::-1] for part in t),
    ],
    ids=["tuple", "list", "mapping", "object", "numpy", "numpy backwards"],
)
def test_batches_accept_every_form_of_task(form: Any) -> None:
    (episodes,) = batches([form(task(i)) for i in range(2)], 8)
    assert episodes.support_x[:, 0, 0].tolist() == [0, 1]
    assert sorted(episodes.query_y[1].tolist()) == [0, 1, 2, 3]


def test_batches_are_lazy() -> None:
    taken = []

    def endless() -> Iterator[tuple[Tensor, ...]]:
        for number in range(10**9):
            taken.append(number)
            yield task(number)

    stream = batches(endless(), 3)
    next(stream)
    assert taken == [0, 1, 2]


BAD: list[tuple[Any, type[Exception], str]] = [
    (task(4, shots=3), ValueError, r"support_x of item 4 has shape \(3, 3\), and of item 3, .*\(2, 3\)"),
    ((*task(4)[:3], torch.arange(4).int()), ValueError, r"query_y of item 4 has type torch.int32, .* torch.int64"),
    ((*task(4)[:3], [0, 1, 2, 3]), TypeError, r"query_y\[0\] of item 4 is int; it must be a tensor or a numpy array"),
    ((*task(4)[:3], np.array(["a"])), TypeError, r"query_y of item 4 is an array that torch cannot take"),
    (task(4)[:3], TypeError, r"item 4 is tuple of length 3 and no task; give \(support_x, support_y, query_x"),
    ({"support_x": task(4)[0]}, TypeError, r"item 4 is dict with the keys support_x and no task"),
    (7, TypeError, r"item 4 is int and no task"),
]


@pytest.mark.parametrize(("bad", "error", "message"), BAD, ids=[message[:20] for *_, message in BAD])
def test_batches_raise_on_bad_tasks(bad: Any, error: type[Exception], message: str) -> None:
    stream = batches([*(task(i) for i in range(4)), bad], 3)
    next(stream)
    with pytest.raises(error, match=message):
        next(stream)


def test_batches_check_size_immediately() -> None:
    with pytest.raises(ValueError, match="size=0; it must be at least 1"):
        batches([], 0)
