"""How many tasks a pass takes by default, and that the meta-gradient does not depend on it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from metalearn import Episodes, InnerLoop, MetaGradient, functionalize, meta_gradient
from metalearn.core.params import relative_error
from metalearn.core.profiling.memory import MemoryLimitError, PeakTensorMemory
from metalearn.metagrad import ENGINES
from metalearn.metagrad.task_chunks import tasks_per_pass
from metalearn.metagrad.unroll import unroll
from metalearn.models import MLP, Conv4
from tests.factories import image_episodes

_INNER = InnerLoop(lr=0.1, steps=2)


def _passes(module: nn.Module, episodes: Episodes, inner: InnerLoop, *, named: bool = True) -> list[int]:
    """Return the number of tasks in each pass of a meta-gradient, by an engine with a name or one of one's own."""
    found: list[int] = []

    def engine(forward, params, chunk, *others) -> MetaGradient:  # type: ignore[no-untyped-def]
        found.append(chunk.tasks)
        return unroll(forward, params, chunk, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENGINES, "unroll", engine)
        meta_gradient(*functionalize(module), episodes, inner, engine=None if named else engine)
    return found


def test_small_maps_take_one_pass_and_large_ones_a_task_each() -> None:
    episodes = image_episodes(tasks=4, ways=5, shots=5, queries=1, dtype=torch.float32)
    assert _passes(Conv4(5), episodes, _INNER) == [4]  # the first maps take 1.2 MiB a task
    assert _passes(Conv4(5, pool="max"), episodes, _INNER) == [1, 1, 1, 1]  # 4.8 MiB


@pytest.mark.parametrize("module", [MLP(784, 5, hidden=(2048,)), Conv4(5, width=256)], ids=["MLP", "Conv4"])
def test_large_weights_take_one_pass(module: nn.Module) -> None:
    episodes = image_episodes(tasks=4, ways=5, shots=1, queries=1, dtype=torch.float32)
    assert max(4 * p.numel() for p in module.parameters()) > 2 * 2**20  # of which four would exceed the limit
    assert _passes(module, episodes, _INNER) == [4]


def test_results_as_large_as_a_weight_count() -> None:
    x, y = torch.randn(4, 1024, 1024), torch.zeros(4, 1024).long()
    assert _passes(nn.Linear(1024, 1024), Episodes(x, y, x[:, :1], y[:, :1]), _INNER) == [2, 2]  # 4 MiB a task


class Curious(nn.Linear):
    """Looks at the gradient of its output by its input."""

    def forward(self, x: Tensor) -> Tensor:
        at = x.detach().requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(at.square().sum(), at)
        return super().forward(x + 0 * slope)


def test_model_that_differentiates_is_measured() -> None:
    x, y = torch.randn(4, 1024, 1024), torch.zeros(4, 1024).long()
    assert _passes(Curious(1024, 2), Episodes(x, y, x[:, :1], y[:, :1]), _INNER) == [2, 2]


def test_engine_of_ones_own_is_given_all_tasks() -> None:
    episodes = image_episodes(tasks=4, ways=5, shots=5, queries=1, dtype=torch.float32)
    assert _passes(Conv4(5, pool="max"), episodes, _INNER, named=False) == [4]


def test_memory_that_runs_out_is_raised_and_not_remembered() -> None:
    forward, theta = functionalize(Conv4(5, pool="max"))
    episodes = image_episodes(tasks=4, ways=5, shots=5, queries=1, dtype=torch.float32)
    with pytest.raises(MemoryLimitError), PeakTensorMemory(limit=10**6):
        tasks_per_pass(forward, theta, episodes, _INNER)
    assert tasks_per_pass(forward, theta, episodes, _INNER) == 1


def test_lack_of_memory_by_torch_is_raised() -> None:
    class Large(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")

    forward, theta = functionalize(Large(3, 2))
    x, y = torch.randn(4, 5, 3), torch.zeros(4, 5).long()
    with pytest.raises(RuntimeError, match="allocate memory"):
        tasks_per_pass(forward, theta, Episodes(x, y, x, y), _INNER)


def test_failing_model_is_tried_once() -> None:
    class Failing(nn.Linear):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            Failing.calls += 1
            raise ValueError("not today")

    forward, theta = functionalize(Failing(3, 2))
    x, y = torch.randn(4, 5, 3), torch.zeros(4, 5).long()
    assert [tasks_per_pass(forward, theta, Episodes(x, y, x, y), _INNER) for _ in range(3)] == [4, 4, 4]
    assert Failing.calls == 1


def test_passes_are_of_nearly_the_same_size() -> None:
    episodes = image_episodes(tasks=7, ways=5, shots=6, queries=1, dtype=torch.float32)
    assert _passes(Conv4(5), episodes, _INNER) == [4, 3]  # five would fit


@pytest.mark.parametrize("size", [1, 3, 99])
def test_a_given_number_wins(size: int) -> None:
    episodes = image_episodes(tasks=4, ways=5, shots=5, queries=1, dtype=torch.float32)
    expected = {1: [1, 1, 1, 1], 3: [3, 1], 99: [4]}[size]
    assert _passes(Conv4(5, pool="max"), episodes, replace(_INNER, task_chunk=size)) == expected


@pytest.mark.parametrize("engine", ENGINES)
def test_default_equals_all_tasks_at_once(engine: str) -> None:
    episodes = image_episodes(tasks=3, ways=5, shots=5, queries=2, dtype=torch.float64)
    forward, theta = functionalize(Conv4(5, pool="max").double())
    by_default, at_once = (
        meta_gradient(forward, theta, episodes, replace(_INNER, engine=engine, task_chunk=size)) for size in (None, 3)
    )
    assert relative_error(by_default.grads, at_once.grads) < 1e-11
    torch.testing.assert_close(by_default.predictions, at_once.predictions)


def test_choice_draws_no_random_number_and_needs_one_pass_of_the_model() -> None:
    class Counted(nn.Linear):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            Counted.calls += 1
            return nn.functional.dropout(super().forward(x), 0.5)

    forward, theta = functionalize(Counted(3, 2))
    x, y = torch.randn(4, 5, 3), torch.zeros(4, 5).long()
    before = torch.get_rng_state()
    for _ in range(3):
        assert tasks_per_pass(forward, theta, Episodes(x, y, x, y), _INNER) == 4
    assert Counted.calls == 1
    assert torch.equal(torch.get_rng_state(), before)


def test_failing_model_is_explained_by_the_meta_gradient() -> None:
    x, y = torch.randn(4, 5, 3), torch.zeros(4, 5).long()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        meta_gradient(*functionalize(nn.Linear(4, 2)), Episodes(x, y, x, y), _INNER)
