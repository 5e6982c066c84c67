"""Decide for each layer whether a kernel of this folder takes the place of torch's.

A model is written with ``nn.Conv2d``, ``nn.BatchNorm2d`` and ``nn.ReLU``: inside
``CorrectedOperations(kernels=STACKED_LAYERS)`` the kernels of this folder replace those calls that ``vmap`` batches
over tasks and that they support. They give the same numbers up to rounding, and derivatives of any order, of which one
may be in forward mode.

``conv2d``, ``batch_norm`` and ``relu`` can also be called directly, by a class that defines ``batched_forward(params,
x)`` (see ``functionalize``): ``vmap`` takes longer than a small layer.

On GPUs they are used inside ``kernels_on_gpus()``: they launch fewer operations, each over all tasks, and whether that
is faster depends on the GPU and the shapes (not measured). A training measures it at its start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch.nn import functional

from metalearn.models.kernels.batch_norm import batch_norm
from metalearn.models.kernels.conv2d import conv2d
from metalearn.models.kernels.layout import forward_over_forward
from metalearn.models.kernels.relu import relu

_ON_GPUS: ContextVar[bool] = ContextVar("kernels_on_gpus", default=False)


@contextmanager
def kernels_on_gpus(enabled: bool = True) -> Iterator[None]:
    """Use the kernels on GPUs as well inside, or not; on CPUs they are always used.

    Examples:
        >>> with kernels_on_gpus():
        ...     result = meta_gradient(forward, theta, episodes, inner)
    """
    token = _ON_GPUS.set(enabled)
    try:
        yield
    finally:
        _ON_GPUS.reset(token)


def _conv2d(
    input: Tensor,  # noqa: A002  # as torch calls it
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    plain = not isinstance(padding, str) and _pair(dilation) == (1, 1) and groups == 1 and input.ndim == 4
    if not (
        plain
        and _supports(input, weight)
        and input.dtype == weight.dtype
        and _has_valid_output(input, weight, stride, padding)
    ):
        return NotImplemented
    both = {"stride": _pair(stride), "padding": _pair(padding)}
    y = conv2d(input.unsqueeze(0), weight.unsqueeze(0), **both).squeeze(0)
    return y if bias is None else y + bias.view(-1, 1, 1)


def _batch_norm(
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    uses_batch_statistics = training and running_mean is None and running_var is None
    if not uses_batch_statistics or input.ndim != 4 or input.numel() <= input.shape[1]:
        return NotImplemented
    # Also with shared weights or none: torch's own layer is less exact on images in the layout of the kernels.
    gamma = torch.ones(input.shape[1], dtype=input.dtype, device=input.device) if weight is None else weight
    beta = torch.zeros(input.shape[1], dtype=input.dtype, device=input.device) if bias is None else bias
    if not _supports(input, input, gamma, beta) or not input.dtype == gamma.dtype == beta.dtype:
        return NotImplemented
    return batch_norm(input.unsqueeze(0), gamma.unsqueeze(0), beta.unsqueeze(0), eps).squeeze(0)


def _relu(input: Tensor, inplace: bool = False) -> Any:  # noqa: A002
    if inplace or input.ndim != 4 or not _supports(input, input):
        return NotImplemented
    return relu(input.unsqueeze(0)).squeeze(0)


STACKED_LAYERS: dict[Any, Callable[..., Any]] = {
    torch.conv2d: _conv2d,
    functional.batch_norm: _batch_norm,
    functional.relu: _relu,
    torch.relu: _relu,
}
"""Replacements of torch's functions for batched tasks; they return ``NotImplemented`` where they do not apply."""


def _supports(x: Tensor, *tensors: Tensor) -> bool:
    """Return whether the kernels support x, in float32 or float64, and any other tensor differs by task."""
    return any(map(is_batchedtensor, tensors)) and _is_supported(x)


def _is_supported(x: Tensor) -> bool:
    device = x.device.type
    supported = (device == "cpu" or (device == "cuda" and _ON_GPUS.get())) and x.dtype in (torch.float32, torch.float64)
    return supported and not torch.is_autocast_enabled(device) and not forward_over_forward()


def _has_valid_output(x: Tensor, weight: Tensor, stride: Any, padding: Any) -> bool:
    """Return whether there is an output; if not, torch raises its error."""
    sizes = zip(x.shape[-2:], weight.shape[-2:], _pair(stride), _pair(padding), strict=True)
    return x.shape[0] > 0 and all(step > 0 and pad >= 0 and size + 2 * pad >= k for size, k, step, pad in sizes)


def kernels_support(fast: dict[str, Tensor], x: Tensor) -> bool:
    """Return whether the kernels support these stacked parameters and inputs as they are."""
    return _is_supported(x) and all((w.device, w.dtype) == (x.device, x.dtype) for w in fast.values())


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    first, *others = value
    return int(first), int(others[0] if others else first)
