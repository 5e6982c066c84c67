"""Describe what a benchmark runs on, and how busy other processes keep that machine meanwhile."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil
import torch

from metalearn.core.profiling.hardware import describe_hardware
from metalearn.core.text import plural

_PEERS = ("jax", "jaxlib", "learn2learn", "higher", "torchopt")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return ``describe_hardware``, the cores that this process may use, OpenMP's spin count, and versions."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = {}
    for name in _PEERS:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    spins = os.environ.get("GOMP_SPINCOUNT")
    return {**describe_hardware(device), "cores_available": available, "spin_count": spins, "peers": versions}


@contextmanager
def other_work() -> Iterator[dict[str, float]]:
    """Measure, into the dictionary, how many cores processes other than this one and its children used meanwhile.

    Where a container shows the counters of its host, all of the host's work is counted. ``load_average`` is the last
    minute's, this process included.
    """
    found: dict[str, float] = {}
    psutil.cpu_percent()  # since its last call
    own, started = _own_seconds(), time.perf_counter()
    yield found
    used = (_own_seconds() - own) / (time.perf_counter() - started)
    busy = psutil.cpu_percent() / 100 * (psutil.cpu_count() or 1)
    found |= {"others_cores": max(0.0, busy - used), "load_average": psutil.getloadavg()[0]}


def _own_seconds() -> float:
    """Return the CPU time of this process and its children, on Linux also of those that have ended."""
    this = psutil.Process()
    seconds = 0.0
    for process in (this, *this.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):  # it has just ended
            t = process.cpu_times()
            seconds += t.user + t.system + t.children_user + t.children_system
    return seconds


def describe_in_a_line(machine: dict[str, Any], others: dict[str, float]) -> str:
    """Return the machine, threads, versions and what else was running as one line."""
    versions = {"torch": machine["torch"], **machine["peers"]}
    return (
        f"{machine['cpu']}, {machine['cores_available']} of {machine['cores']} cores, torch on "
        f"{plural(machine['threads'], 'thread')}; other work took {others['others_cores']:.1f} cores, "
        f"load {others['load_average']:.1f}; " + ", ".join(f"{name} {version}" for name, version in versions.items())
    )
