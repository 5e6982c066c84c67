"""How much memory the tensors of a computation take at once."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

MIB = 2**20


class MemoryLimitError(Exception):
    """What is measured does not fit."""


class PeakTensorMemory(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, among those made while it is entered; ``peak`` is their maximum.

    Every operation is seen, in forward and backward passes and below ``vmap``. What a kernel takes and gives back
    inside itself is not seen. A step runs several times slower under it.

    Example:
        >>> with LiveTensorBytes() as live:
        ...     x = torch.zeros(1024)
        >>> live.peak
        4096

    Args:
        limit: bytes at which to give up, for measuring what might not fit; ``None`` never does.

    Raises:
        MemoryLimitError: from within an operation, as soon as more than ``limit`` bytes are alive.
    """

    def __init__(self, limit: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # not annotated in torch
        self.peak = 0
        self._limit = limit
        self._now = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs: list[Any] = []
        tree_map_only(Tensor, lambda t: inputs.append(t.untyped_storage()), (args, kwargs))
        out = func(*args, **(kwargs or {}))
        before = {id(storage) for storage in inputs}
        tree_map_only(Tensor, lambda t: self._count(t, before), out)
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
