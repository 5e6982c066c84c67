"""Peak memory of a meta-step: the allocator's own figure on CUDA, the live tensors' bytes on a CPU."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

MIB = 2**20


class LiveTensorBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, among those made while it is entered; ``peak`` is their maximum.

    Every operation is seen, in forward and backward passes and below ``vmap``. What a kernel takes and gives back
    inside itself is not seen. A step runs several times slower under it.

    Example:
        >>> with LiveTensorBytes() as live:
        ...     x = torch.zeros(1024)
        >>> live.peak
        4096
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # not annotated in torch
        self.peak = 0
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
        size = storage.nbytes()
        self._known[storage] = size
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self._now -= size
