"""Peak memory of live tensors, on sizes counted by hand."""

from __future__ import annotations

import torch
from torch import nn

from metalearn import Episodes, InnerLoop, functionalize, meta_gradient
from metalearn.core.profiling.memory import PeakTensorMemory
from metalearn.models import Conv4
from tests.factories import image_episodes


def test_peak_counts_live_tensors() -> None:
    with PeakTensorMemory() as live:
        x = torch.zeros(1000)  # 4,000 bytes
        y = x + 1  # 8,000
        del x
        z = y.view(10, 100)  # a view takes nothing
        w = z * 2  # 8,000 again
    assert live.peak == 8000
    assert w.shape == (10, 100)


def test_views_and_earlier_tensors_are_not_counted() -> None:
    x = torch.zeros(1000)
    with PeakTensorMemory() as live:
        x.view(-1)[:10].add_(1)
    assert live.peak == 0


def test_saved_tensors_and_backward_pass_are_counted() -> None:
    x = torch.zeros(1000, requires_grad=True)
    with PeakTensorMemory() as live:
        loss = x.exp().exp().sum()  # two results of 4,000 bytes are kept for backward
        assert live.peak >= 8000
        (grad,) = torch.autograd.grad(loss, x)
    assert 12000 <= live.peak < 20000
    assert grad.shape == (1000,)


def test_memory_of_second_order_grows_with_steps() -> None:
    forward, theta = functionalize(Conv4(3, width=8))
    episodes = image_episodes(dtype=torch.float32)

    def peak(steps: int, *, second_order: bool) -> int:
        live = PeakTensorMemory()
        with live:
            meta_gradient(forward, theta, episodes, InnerLoop(lr=0.1, steps=steps, second_order=second_order))
        return live.peak

    assert peak(1, second_order=False) < peak(1, second_order=True) < peak(3, second_order=True)
    assert peak(3, second_order=False) < 1.1 * peak(1, second_order=False)


def test_gradients_of_task_chunks_are_freed() -> None:
    forward, theta = functionalize(nn.Linear(400, 400))
    x, y = torch.randn(16, 1, 400), torch.zeros(16, 1).long()
    live = PeakTensorMemory()
    with live:
        meta_gradient(forward, theta, Episodes(x, y, x, y), InnerLoop(lr=0.1, steps=1, task_chunk=1))
    assert live.peak < 10 * 400 * 400 * 4, "some copies of the parameters, and not sixteen"


def test_task_chunk_bounds_memory() -> None:
    forward, theta = functionalize(Conv4(3, width=8))
    episodes = image_episodes(tasks=8, dtype=torch.float32)

    def peak(chunk: int | None) -> int:
        live = PeakTensorMemory()
        with live:
            meta_gradient(forward, theta, episodes, InnerLoop(lr=0.1, steps=2, task_chunk=chunk))
        return live.peak

    assert peak(2) < 0.5 * peak(None)


def test_peak_memory_ignores_tensors_without_memory() -> None:
    with PeakTensorMemory() as live:
        zeros = torch._efficientzerotensor(1000)  # forward mode's tangent of a constant
        shape = torch.empty(1000, device="meta")
    assert (zeros.numel(), shape.numel(), live.peak) == (1000, 1000, 0)
