"""Peak memory of live tensors, on sizes counted by hand; the allocator's settings and the number of threads."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys

import pytest
import torch
from torch import nn

from metalearn import Episodes, InnerLoop, functionalize, meta_gradient
from metalearn.core.profiling.hardware import configure_malloc, one_thread
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


def peak(module: nn.Module, episodes: Episodes, inner: InnerLoop) -> int:
    forward, theta = functionalize(module)
    live = PeakTensorMemory()
    with live:
        meta_gradient(forward, theta, episodes, inner)
    return live.peak


def test_memory_of_second_order_grows_with_steps() -> None:
    module, episodes = Conv4(3, width=8), image_episodes(dtype=torch.float32)
    first, first_of_three, second, second_of_three = (
        peak(module, episodes, InnerLoop(lr=0.1, steps=steps, second_order=second_order))
        for second_order in (False, True)
        for steps in (1, 3)
    )
    assert first < second < second_of_three
    assert first_of_three < 1.1 * first


def test_gradients_of_task_chunks_are_freed() -> None:
    x, y = torch.randn(16, 1, 400), torch.zeros(16, 1).long()
    found = peak(nn.Linear(400, 400), Episodes(x, y, x, y), InnerLoop(lr=0.1, steps=1, task_chunk=1))
    assert found < 10 * 400 * 400 * 4, "some copies of the parameters, and not sixteen"


def test_task_chunk_bounds_memory() -> None:
    module, episodes = Conv4(3, width=8), image_episodes(tasks=8, dtype=torch.float32)
    chunked, whole = (peak(module, episodes, InnerLoop(lr=0.1, steps=2, task_chunk=chunk)) for chunk in (2, None))
    assert chunked < 0.5 * whole


def test_peak_memory_ignores_tensors_without_memory() -> None:
    with PeakTensorMemory() as live:
        zeros = torch._efficientzerotensor(1000)  # forward mode's tangent of a constant
        shape = torch.empty(1000, device="meta")
    assert (zeros.numel(), shape.numel(), live.peak) == (1000, 1000, 0)


@pytest.mark.parametrize("mib", [8, 64])  # glibc's own threshold never exceeds 32 MiB
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_configure_malloc_keeps_freed_memory(mib: int) -> None:
    code = (
        "import resource, sys, torch\n"
        "from metalearn import configure_malloc\n"
        "if sys.argv[1] == 'keep': assert configure_malloc()\n"
        "def step():\n"
        f"    held = [torch.ones({mib} * 2**18) for _ in range(8)]\n"
        "for _ in range(3): step()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(3): step()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )
    # A fixed threshold has every tensor mapped and unmapped unless memory is kept. With the moving one that is glibc's
    # default, a small object that happens to lie above the tensors keeps them mapped too, now and then.
    env = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=1048576"}
    keep, not_keep = (
        int(subprocess.check_output([sys.executable, "-c", code, word], env=env)) for word in ("keep", "not")
    )
    assert keep < 100 < not_keep


def test_configure_malloc_does_nothing_without_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(ctypes, "CDLL", None)
    assert configure_malloc() is False


def test_one_thread_restores_threads() -> None:
    before = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
