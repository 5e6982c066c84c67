"""Measure the peak memory of a computation: the allocator's count on CUDA, the bytes of live tensors on a CPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

MIB = 2**20


class MemoryLimitError(MemoryError):
    """Raised when the measured computation exceeds its memory limit, or runs out of memory."""


class PeakTensorMemory(TorchDispatchMode):
    """Context that counts the bytes of live tensors among those created inside it; ``peak`` is the maximum.

    It sees every operation, in forward and backward passes and below ``vmap``, but not the temporary memory of a
    kernel. A step runs several times slower inside it.

    Raises:
        MemoryLimitError: inside an operation, as soon as more than ``limit`` bytes are alive.

    Examples:
        >>> with PeakTensorMemory() as live:
        ...     x = torch.zeros(1024)
        >>> live.peak
        4096
    """

    def __init__(self, limit: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # not annotated in torch
        self.peak: int = 0
        self._limit = limit
        self._now = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [t.untyped_storage() for t in _tensors((args, *kwargs.values()))]
        out = func(*args, **kwargs)
        before = {id(storage) for storage in inputs}
        for tensor in _tensors(out):
            self._count(tensor, before)
        return out

    def _count(self, tensor: Tensor, inputs: set[int]) -> None:
        storage = tensor.untyped_storage()  # torch keeps one Python object per storage while that lives
        if storage in self._known or id(storage) in inputs:
            return
        if storage.device.type == "meta" or tensor._is_zerotensor():  # forward mode's zeros have a size and no memory
            return
        size = storage.nbytes()
        self._known[storage] = size
        self._now += size
        self.peak = max(self.peak, self._now)
        if self._limit is not None and self._now > self._limit:
            raise MemoryLimitError(f"more than {self._limit / MIB:.0f} MiB of tensors")
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self._now -= size


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of an operation's arguments or result; in half of the time of ``torch.utils._pytree``."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)


def peak_bytes(step: Callable[[], object], device: torch.device, *, limit: int | None = None) -> int:
    """Return the peak memory of one step, beyond what was allocated before it.

    On CUDA the step runs twice, as libraries allocate workspaces in the first that stay.

    Raises:
        MemoryLimitError: if it takes more than ``limit`` bytes, or runs out of memory.
    """
    if device.type != "cuda":
        live = PeakTensorMemory(limit)
        with live:
            step()
        return live.peak
    reason = ""
    try:
        step()
        torch.cuda.synchronize(device)
        before: int = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
    except torch.OutOfMemoryError as error:
        reason = str(error)
    if reason:  # raised out here, because the traceback would keep what did fit
        raise MemoryLimitError(reason)
    peak: int = torch.cuda.max_memory_allocated(device) - before
    if limit is not None and peak > limit:
        raise MemoryLimitError(f"{peak / MIB:.0f} MiB")
    return peak
