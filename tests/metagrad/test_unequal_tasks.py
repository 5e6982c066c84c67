"""Tasks of unequal size: every engine equals autograd on one task at a time, and nothing is padded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from metalearn import Episodes, InnerLoop, NonFiniteLossError, batches, functionalize, meta_gradient
from metalearn.algorithms import imaml, maml_pp, protonet, reptile
from metalearn.core.module_parts import module_parts
from metalearn.core.params import relative_error
from metalearn.metagrad.baselines.by_hand import meta_gradient as by_hand
from metalearn.metagrad.meta_gradient import ENGINES

WAYS = [5, 3, 5, 2, 4, 3]
SHOTS = [1, 4, 1, 3, 2, 4]
QUERIES = [2, 3, 2, 1, 3, 3]
INNER = InnerLoop(lr=0.2, steps=2)


class Net(nn.Module):
    """Normalizes over the examples, attends from each to all others, and has an output for each possible class."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.norm(self.first(x)).tanh()
        h = h + torch.softmax(h @ h.T, dim=-1) @ h
        out: Tensor = self.head(h)
        return out


def weighted(prediction: Tensor, y: Tensor) -> Tensor:
    """Take a mean that is weighted by class, so that it is none of the examples' own losses."""
    return cross_entropy(prediction, y, weight=torch.arange(1.0, 6.0, dtype=torch.float64))


def tasks() -> list[tuple[Tensor, ...]]:
    g = torch.Generator().manual_seed(0)

    def draw(ways: int, each: int) -> tuple[Tensor, Tensor]:
        y = torch.arange(ways).repeat_interleave(each)
        return torch.randn(ways, 4, generator=g, dtype=torch.float64)[y] + 0.3 * torch.randn(
            len(y), 4, generator=g, dtype=torch.float64
        ), y

    return [(*draw(n, k), *draw(n, q)) for n, k, q in zip(WAYS, SHOTS, QUERIES, strict=True)]


@pytest.mark.parametrize("task_chunk", [None, 1])
@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("engine", ENGINES)
def test_unequal_tasks_equal_one_at_a_time(engine: str, second_order: bool, task_chunk: int | None) -> None:
    torch.manual_seed(0)
    module = Net().double()
    forward, theta = functionalize(module)
    (groups,) = batches(tasks(), size=len(WAYS), unequal=True)
    assert [group.tasks for group in groups] == [2, 2, 1, 1]
    inner = replace(INNER, engine=engine, second_order=second_order, task_chunk=task_chunk)
    result = meta_gradient(forward, theta, groups, inner, loss=weighted)
    plain = replace(INNER, second_order=second_order)
    alone = [by_hand(module, task, plain, loss=weighted) for task in batches(tasks(), size=1)]
    want = {name: torch.stack([one.grads[name] for one in alone]).mean(dim=0) for name in theta}
    assert relative_error(result.grads, want) < 1e-12
    in_groups = [0, 2, 1, 5, 3, 4]
    flat = [prediction for group in result.predictions for prediction in group]
    for place, task in enumerate(in_groups):
        torch.testing.assert_close(flat[place], alone[task].predictions[0], rtol=1e-10, atol=1e-12)
    assert result.support_loss.shape == (INNER.steps,)


@pytest.mark.parametrize("build", [maml_pp, protonet, reptile, imaml])
def test_algorithms_take_unequal_tasks(build: Any) -> None:
    torch.manual_seed(0)
    module = Net().double()
    algorithm = build(INNER, module_parts(module))
    forward, params = functionalize(module)
    theta = algorithm.init(params)
    even = [(x, y, x, y) for x, y, *_ in tasks()]  # prototypes need every class, so each task has its own outputs
    (groups,) = batches([even[0], even[2], even[4]] if build is not protonet else [even[0], even[2]], 3, unequal=True)
    got = algorithm.meta_gradient(forward, theta, groups)
    parts = [algorithm.meta_gradient(forward, theta, task) for group in groups for task in group.split(1)]
    mean = {name: torch.stack([part.grads[name] for part in parts]).mean(dim=0) for name in got.grads}
    assert relative_error(got.grads, mean) < 1e-12


def test_error_counts_the_tasks_of_earlier_groups() -> None:
    forward, theta = functionalize(Net().double())
    (groups,) = batches(tasks(), size=len(WAYS), unequal=True)
    groups[2].query_x[0, 0, 0] = torch.inf
    with pytest.raises(NonFiniteLossError, match="the query loss of task 4 is"):
        meta_gradient(forward, theta, groups, INNER)


def test_what_is_no_group_raises() -> None:
    forward, theta = functionalize(Net().double())
    episodes: Any
    for episodes, error, message in (
        ([], ValueError, "episodes is an empty list"),
        (tasks(), TypeError, "episodes is list; it must be Episodes, or a list of several"),
        (None, TypeError, "episodes is NoneType; it must be Episodes"),
    ):
        with pytest.raises(error, match=message):
            meta_gradient(forward, theta, episodes, INNER)


def test_batches_stay_in_order_and_agree() -> None:
    every = tasks()
    sizes = [[group.tasks for group in batch] for batch in batches(every, size=4, unequal=True)]
    assert sizes == [[2, 1, 1], [1, 1]]
    (groups,) = batches(every, size=len(every), unequal=True)
    assert all(isinstance(group, Episodes) for group in groups)
    assert torch.equal(groups[0].support_x[1], every[2][0])
