"""Describe the hardware, set the number of threads, and configure the C library's allocator and torch's kernels."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from metalearn.core.text import plural

log = logging.getLogger(__name__)

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # of <malloc.h>
_LARGEST_INT = 2**31 - 1
_PAD = 64 * 2**20


def describe_hardware(device: torch.device) -> dict[str, str | int | None]:
    """Return the processor, cores, threads and versions, and the name of the GPU if ``device`` is one."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    description: dict[str, str | int | None] = {
        "cpu": next(names, platform.machine()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
    if device.type == "cuda":
        description["gpu"] = torch.cuda.get_device_name(device)
    return description


@functools.cache
def checkout_commit() -> str | None:
    """Return the commit of the checkout that metalearn runs from, with ``-dirty`` if files have changed since.

    It is that of the first call; ``None`` where metalearn is installed.
    """
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def avoid_triton_without_compiler() -> None:
    """Have torch use its own CUDA kernels where Triton's, which it prefers for some operations, cannot be built.

    Triton builds its launcher by a C compiler (``CC``, gcc or clang) when an operation first runs, and torch does not
    fall back if there is none.
    """
    if "CC" in os.environ or shutil.which("gcc") or shutil.which("clang"):
        return
    try:
        from torch._native.registry import deregister_op_overrides
    except ImportError:  # before torch 2.13 there was nothing to fall back from
        return
    deregister_op_overrides(disable_dsl_names="triton")


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_num_threads(threads: int) -> None:
    """Set torch's number of CPU threads as ``run.threads`` says; warn if there are fewer cores."""
    if threads > (cores := num_cores()):
        log.warning(
            "run.threads=%d: this process may use %s, and more threads wait for each other; take %d or auto.",
            *(threads, plural(cores, "core"), cores),
        )
    torch.set_num_threads(threads)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread inside: small tensors gain nothing from more, and more wait for each other when busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def configure_malloc() -> bool:
    """Let glibc keep freed memory for the rest of this process; return whether it does (False without glibc).

    By default every meta-step's memory is returned to the system, zeroed and mapped again, which took up to a quarter
    of a second-order meta-step on a CPU. Kept memory counts as resident memory of the process, and the setting holds
    for all of it, so that only a program should call this, once, before it trains: ``train.py`` does.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _LARGEST_INT), (_TOP_PAD, _PAD))
    accepted = [mallopt(name, value) for name, value in settings]
    return all(accepted)
