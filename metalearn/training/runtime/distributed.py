"""One training by several processes, each with a share of every batch's tasks: the only place for torch.distributed.

    d/dtheta 1/T sum_t L_t = sum_r (T_r / T) d/dtheta 1/T_r sum_{t in r} L_t

so each process takes the mean over its own tasks, and one all-reduce a meta-step adds them up, weighted.
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

_TIMEOUT = timedelta(minutes=10)  # for a process that is stuck; one that has died is noticed at once
_CPU = torch.device("cpu")


class LostRankError(RunError):
    """Another process of the run is gone, so that nothing can be added up any more."""

    def __init__(self, ranks: DistributedContext, error: Exception) -> None:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0][:200]
        super().__init__(
            f"process {ranks.rank} of {ranks.size}: another process of this run has ended or cannot be reached "
            f"({reason}). Look for its own message above; then go on in the run's folder with run.resume=true, with as "
            "many processes as you like."
        )


@dataclass(frozen=True)
class DistributedContext:
    """The processes of a run.

    Args:
        rank: this one's number.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that logs and saves."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Those of ``count`` tasks that are this process's; sizes differ by one at most."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sums over all processes, by one all-reduce.

        Args:
            tensors: floating point, of the same shapes in every process.

        Raises:
            LostProcessError: if a process is gone.
        """
        if self.size == 1:
            return list(tensors)
        flat = torch.cat([t.flatten() for t in tensors])
        with self._together():
            dist.all_reduce(flat)
            if flat.is_cuda:  # where a lost process shows only now
                torch.cuda.synchronize(flat.device)
        parts = flat.split([t.numel() for t in tensors])
        return [part.view_as(t) for part, t in zip(parts, tensors, strict=True)]

    def join(self, values: Tensor) -> Tensor:
        """Every process's ``[..., its tasks]`` as ``[..., all tasks]``, in the order of ``share``.

        Raises:
            LostProcessError: if a process is gone.
        """
        if self.size == 1:
            return values
        parts: list[Any] = [None] * self.size
        with self._together():
            dist.all_gather_object(parts, values.cpu())
        return torch.cat(parts, dim=-1)

    def broadcast(self, content: Any) -> Any:
        """What the first process gives, in every process.

        Raises:
            LostProcessError: if a process is gone.
        """
        if self.size == 1:
            return content
        box = [content]
        with self._together():
            dist.broadcast_object_list(box, src=0, device=_CPU)
        return box[0]

    def wait_for_main(self) -> None:
        """Let the first process come this far, if it still lives."""
        with suppress(LostRankError):
            self.broadcast(None)

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise LostRankError(self, error) from None


@contextmanager
def init_distributed(device: torch.device) -> Iterator[DistributedContext]:
    """This process among those that ``torchrun`` started; alone where it started none.

    Args:
        device: this process's own. Tensors there are added up by NCCL if it is a GPU, by gloo else.

    Raises:
        RunError: if the others cannot be reached.
    """
    if torchrun.world_size() == 1:
        yield DistributedContext()
        return
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    # Its functions take the group that is there when they are defined as a default, and torch._dynamo imports them. A
    # group that they hold outlives the run, with threads of gloo's that then end the process by SIGABRT, once in a
    # hundred times: one that drops a tensor while Python shuts down cannot have the interpreter's lock.
    importlib.import_module("torch.distributed.nn.functional")
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise RunError(f"the processes of this run cannot reach each other: {error}") from error
    try:
        yield DistributedContext(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
