"""Recorded BatchNorm statistics for prediction alone: each query is normalised independently (non-transductive).

    mean_{l,k}, var_{l,k}:  of the inputs of the l-th BatchNorm when queries pass after k inner steps, over tasks

They are entries of theta, ``norm_mean::l`` and ``norm_var::l``, ``[K + 1, C]``, and constants for every gradient.
(Per-step batch normalisation statistics, Antoniou et al. 2019, arXiv 1810.09502, section 4; their code keeps them and
normalises by the batch nonetheless. Means over current tasks, not running ones: Wu & Johnson 2021, arXiv 2105.07576.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from metalearn.core.types import Forward, Params
from metalearn.inner.batching import over_tasks
from metalearn.inner.update_rules import SEPARATOR

_MEAN, _VAR = f"norm_mean{SEPARATOR}", f"norm_var{SEPARATOR}"


class ChannelMoments(NamedTuple):
    """Mean and variance by channel, ``[..., C]``, of one BatchNorm's input."""

    mean: Tensor
    var: Tensor


def is_norm_statistic(name: str) -> bool:
    """Return whether an entry of theta is a BatchNorm statistic."""
    return name.startswith((_MEAN, _VAR))


def statistics_at(theta: Params, k: int) -> list[ChannelMoments] | None:
    """Return the statistics after k steps, or the last ones, layer by layer; ``None`` if theta has none."""
    layers = sum(name.startswith(_MEAN) for name in theta)
    pairs = [(theta[f"{_MEAN}{i}"], theta[f"{_VAR}{i}"]) for i in range(layers)]
    return [ChannelMoments(m[min(k, len(m) - 1)], v[min(k, len(v) - 1)]) for m, v in pairs] or None


def statistics_to_params(by_step: list[list[ChannelMoments]]) -> Params:
    """Convert the statistics after 0, 1, ..., K steps to entries of theta."""
    entries: Params = {}
    for i, layer in enumerate(zip(*by_step, strict=True)):
        entries[f"{_MEAN}{i}"] = torch.stack([moments.mean for moments in layer])
        entries[f"{_VAR}{i}"] = torch.stack([moments.var for moments in layer])
    return entries


@torch.no_grad()
def record_statistics(forward: Forward, fast: Params, x: Tensor) -> list[ChannelMoments]:
    """Return the statistics of each BatchNorm layer for inputs ``[T, examples, ...]``, as means over the tasks."""

    def one_task(params: Params, x: Tensor) -> list[ChannelMoments]:
        moments: list[ChannelMoments] = []

        def record(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            dims = [d for d in range(x.ndim) if d != 1]
            wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x  # 8 bits are too few for sums
            moments.append(ChannelMoments(wide.mean(dim=dims), wide.var(dim=dims, correction=0)))
            return functional.batch_norm(x, *args, **kwargs)

        with _ReplaceBatchNorm(record):
            forward(params, x)
        return moments

    layers: list[ChannelMoments] = over_tasks(one_task, fast, x, model=forward)
    return [ChannelMoments(moments.mean.mean(dim=0), moments.var.mean(dim=0)) for moments in layers]


def with_fixed_statistics(forward: Forward, statistics: list[ChannelMoments]) -> Forward:
    """Return the model with these statistics in its BatchNorms, so that examples do not influence one another."""

    def nontransductive(params: Params, x: Tensor) -> Tensor:
        remaining = iter(statistics)

        def normalise(
            x: Tensor,
            running_mean: Tensor | None,
            running_var: Tensor | None,
            weight: Tensor | None = None,
            bias: Tensor | None = None,
            training: bool = False,
            momentum: float = 0.1,
            eps: float = 1e-5,
        ) -> Tensor:
            mean, var = next(remaining)
            shape = (1, -1, *[1] * (x.ndim - 2))
            y = (x - mean.view(shape)) * torch.rsqrt(var + eps).view(shape)
            y = y if weight is None else y * weight.view(shape)
            return y if bias is None else y + bias.view(shape)

        with _ReplaceBatchNorm(normalise):
            return forward(params, x)

    return nontransductive


class _ReplaceBatchNorm(TorchFunctionMode):
    """Calls a function in the place of ``torch.nn.functional.batch_norm``, where that takes the batch's statistics."""

    def __init__(self, replacement: Callable[..., Tensor]) -> None:
        super().__init__()
        self.replacement = replacement

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        replaced = func is functional.batch_norm and not _takes_stored_statistics(*args, **kwargs)
        return (self.replacement if replaced else func)(*args, **kwargs)


def _takes_stored_statistics(
    x: Tensor, mean: Any, var: Any, weight: Any = None, bias: Any = None, training: bool = False, *args: Any, **kw: Any
) -> bool:
    return mean is not None and not training
