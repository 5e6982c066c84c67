"""Count the FLOPs of a meta-step, and measure the peak rate of this machine.

With f the FLOPs of a forward pass, y = W x in every layer, and f_1 its first layer's share:

    gradient                          3 f - f_1      dW = dy x^T and dx = W^T dy; the first layer needs no dx
    gradient and Hessian product      9 f - 5 f_1    each product is linear in two factors, so going back costs two more

A meta-gradient of K inner steps needs K of the latter on the support set (first order: of the former) and one gradient
on the query set. Only matrix products and convolutions are counted, the zeros around an image included, as counters of
FLOPs do (15% of conv4's on 28 x 28 pixels with stride 2). One multiply-add is two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from metalearn.core.profiling.timing import seconds
from metalearn.core.types import Episodes

_MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}  # large enough for the best rate, at a fraction of a second
_REPEATS = 10


class StepFlops(NamedTuple):
    """FLOPs of one meta-gradient of all tasks."""

    first_order: int
    second_order: int


def meta_gradient_flops(module: nn.Module, episodes: Episodes, steps: int) -> StepFlops:
    """Return the FLOPs of K inner steps and their meta-gradient, for tasks of classification.

    Every parameter must be trainable, and only the first layer may see the inputs.
    """
    support = count_flops(lambda: module(episodes.support_x[0]))
    support_gradient = count_flops(lambda: _gradient(module, episodes.support_x[0], episodes.support_y[0]))
    query_gradient = count_flops(lambda: _gradient(module, episodes.query_x[0], episodes.query_y[0]))
    first_layer = 3 * support - support_gradient
    of_task = StepFlops(
        first_order=steps * support_gradient + query_gradient,
        second_order=steps * (9 * support - 5 * first_layer) + query_gradient,
    )
    return StepFlops(*(episodes.tasks * flops for flops in of_task))


def _gradient(module: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    parameters = [p for p in module.parameters() if p.requires_grad]
    return torch.autograd.grad(cross_entropy(module(x), y), parameters)


def count_flops(step: Callable[[], object]) -> int:
    """Return the FLOPs of the matrix products and convolutions in one call, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


def peak_matmul_flops(device: torch.device, *, size: int | None = None) -> float:
    """Return the FLOP/s of the fastest of several float32 ``torch.mm`` of ``size`` rows and columns, on all threads."""
    rows = size or _MATRIX_SIZE[device.type]
    a, b = (torch.rand(rows, rows, device=device) for _ in range(2))
    best = min(seconds(lambda: torch.mm(a, b), device) for _ in range(1 + _REPEATS))
    return 2 * rows**3 / best
