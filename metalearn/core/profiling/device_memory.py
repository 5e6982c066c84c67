"""Peak memory of a meta-step: the allocator's own figure on CUDA, the live tensors' bytes on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch

from metalearn.core.profiling.memory import MIB, MemoryLimitError, PeakTensorMemory


def peak_bytes(step: Callable[[], object], device: torch.device, *, limit: int | None = None) -> int:
    """Peak memory of one step: on CUDA the allocator's, above what was allocated before; else of the tensors it makes.

    Args:
        step: what to measure; it is run once.
        device: where it runs.
        limit: bytes at which to give up.

    Raises:
        MemoryLimitError: if it takes more than ``limit`` bytes, or runs out of memory.
    """
    if device.type != "cuda":
        with PeakTensorMemory(limit) as live:
            step()
        measured: int = live.peak
        return measured
    torch.cuda.synchronize(device)
    before: int = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        step()
    except torch.OutOfMemoryError as error:
        raise MemoryLimitError(str(error)) from None
    peak: int = torch.cuda.max_memory_allocated(device) - before
    if limit is not None and peak > limit:
        raise MemoryLimitError(f"{peak / MIB:.0f} MiB")
    return peak
