"""ReLU whose derivative is constant in x; autograd's own makes zeros for it, and adds them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metalearn.models.kernels.layout import Kernel


def relu(x: Tensor) -> Tensor:
    """Return max(x, 0) of a tensor that leads with T."""
    return _relu(x)


class _ReLU(Kernel):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.relu(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return _relu_backward(g, ctx.saved_tensors[0])

    @staticmethod
    def jvp(ctx: Any, dx: Tensor) -> Any:
        return _relu_backward(dx, ctx.saved_tensors[0])


class _ReLUBackward(Kernel):
    """The gradient g where y is positive, else 0: linear in g, and constant in y almost everywhere."""

    @staticmethod
    def forward(g: Tensor, y: Tensor) -> Tensor:
        return torch.ops.aten.threshold_backward(g, y, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        return _relu_backward(v, ctx.saved_tensors[0]), None

    @staticmethod
    def jvp(ctx: Any, dg: Tensor | None, dy: Tensor | None) -> Any:
        y = ctx.saved_tensors[0]
        return torch.zeros_like(y) if dg is None else _relu_backward(dg, y)


_relu, _relu_backward = _ReLU.apply, _ReLUBackward.apply
