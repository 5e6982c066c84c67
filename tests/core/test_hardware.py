"""The allocator's settings and the number of threads."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys

import pytest
import torch

from metalearn.core.profiling.hardware import configure_malloc, one_thread


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_configure_malloc_keeps_freed_memory() -> None:
    code = (
        "import resource, sys, torch\n"
        "from metalearn.core.profiling.hardware import configure_malloc\n"
        "if sys.argv[1] == 'keep': assert configure_malloc()\n"
        "def step():\n"
        "    held = [torch.ones(2**21) for _ in range(16)]\n"  # 8 MiB each
        "for _ in range(3): step()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(3): step()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )
    # A fixed threshold has every tensor mapped and unmapped unless memory is kept. With the moving one that is glibc's
    # default, a small object that happens to lie above the tensors keeps them mapped too, now and then.
    env = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=1048576"}
    faults = [
        int(
            subprocess.run(
                [sys.executable, "-c", code, word], capture_output=True, text=True, check=True, env=env
            ).stdout
        )
        for word in ("keep", "not")
    ]
    assert faults[0] < 100 < faults[1]


def test_configure_malloc_does_nothing_without_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(ctypes, "CDLL", None)
    assert configure_malloc() is False


def test_one_thread_restores_threads() -> None:
    before = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
