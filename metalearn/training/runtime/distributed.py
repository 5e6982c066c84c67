"""Data-parallel training: each process takes a shard of every batch's tasks. The only file that uses torch.distributed.

    d/dtheta 1/T sum_t L_t = sum_r (T_r / T) d/dtheta 1/T_r sum_{t in r} L_t

Each process takes the mean over its own tasks; one all-reduce a meta-step adds the weighted means.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from metalearn.core.errors import RunError
from metalearn.training.runtime import torchrun

_TIMEOUT = timedelta(minutes=10)  # for a process that hangs; one that has died is noticed at once
_CPU = torch.device("cpu")


class LostRankError(RunError):
    """Another process of the run has ended or cannot be reached."""

    def __init__(self, ranks: DistributedContext, error: Exception) -> None:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0][:200]
        super().__init__(
            f"process {ranks.rank} of {ranks.size}: another process of this run has ended or cannot be reached "
            f"({reason}). Look for its own message above; then resume the run in its folder with run.resume=true, with "
            "as many processes as you like."
        )


@dataclass(frozen=True)
class DistributedContext:
    """The rank of this process, and the number of processes of the run; collectives raise ``LostRankError``."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """True in the process that logs and saves."""
        return self.rank == 0

    def shard(self, count: int) -> range:
        """Return this process's part of ``count`` tasks; sizes differ by one at most."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def all_reduce_sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the sums of floating-point tensors over all processes, with one all-reduce."""
        if self.size == 1:
            return list(tensors)
        flat = torch.cat([t.flatten() for t in tensors])
        with self._collective():
            dist.all_reduce(flat)
            if flat.is_cuda:  # a lost process shows only here
                torch.cuda.synchronize(flat.device)
        parts = flat.split([t.numel() for t in tensors])
        return [part.view_as(t) for part, t in zip(parts, tensors, strict=True)]

    def all_gather(self, values: Tensor) -> Tensor:
        """Concatenate every process's ``[..., its tasks]`` to ``[..., all tasks]``, in the order of ``shard``."""
        if self.size == 1:
            return values
        parts: list[Any] = [None] * self.size
        with self._collective():
            dist.all_gather_object(parts, values.cpu())
        return torch.cat(parts, dim=-1)

    def broadcast(self, content: Any) -> Any:
        """Return the main process's ``content`` in every process."""
        if self.size == 1:
            return content
        box = [content]
        with self._collective():
            dist.broadcast_object_list(box, src=0, device=_CPU)
        return box[0]

    def wait_for_main(self) -> None:
        """Wait until the main process has reached this point, if it still runs."""
        with suppress(LostRankError):
            self.broadcast(None)

    @contextmanager
    def _collective(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise LostRankError(self, error) from None


@contextmanager
def init_distributed(device: torch.device) -> Iterator[DistributedContext]:
    """Join the processes that ``torchrun`` started, if any; raise ``RunError`` if they cannot be reached."""
    if torchrun.world_size() == 1:
        yield DistributedContext()
        return
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    # Functions of this module take the default group as a default argument when it is imported, and torch._dynamo
    # imports it. A group held that way outlives the run; its gloo threads then end the process by SIGABRT once in a
    # hundred times, when one drops a tensor while Python shuts down. So import it before there is a group.
    importlib.import_module("torch.distributed.nn.functional")
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise RunError(f"the processes of this run cannot reach each other: {error}") from error
    try:
        yield DistributedContext(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
