"""Convolutions of T tasks, each with its own weights, closed under differentiation.

A convolution y = x * w is linear in both arguments, and so are the two products of its gradient:

    conv(x, w)                y
    conv_input_grad(g, w)     the x for which <x, conv_input_grad(g, w)> = <g, conv(x, w)>
    conv_weight_grad(x, g)    the w for which <w, conv_weight_grad(x, g)> = <g, conv(x, w)>

The derivative of each is a sum of the three, so that a double backward costs six such products. Autograd's own runs a
generic formula, which is several times slower for grouped convolutions.

Before the first inner step all tasks have the same weight, expanded without a copy. The first two products are then one
plain convolution of [C, H, W, T] volumes with a window of one task: two to four times faster than T groups.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metalearn.models.kernels.layout import (
    Kernel,
    merge_tasks_into_channels,
    split_tasks_from_channels,
    to_kernel_layout,
    uses_torch_kernels,
)

_MAX_MATMUL_ROWS = 128
"""Rows per task up to which one batched matrix product was measured to be faster than a grouped convolution."""


class ConvGeometry(NamedTuple):
    """Stride, padding, and sizes of image and kernel of a convolution."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    image: tuple[int, int]
    window: tuple[int, int]

    @property
    def out(self) -> tuple[int, int]:
        """Height and width of the output."""
        down, across = (
            (size + 2 * pad - span) // step + 1
            for size, pad, span, step in zip(self.image, self.padding, self.window, self.stride, strict=True)
        )
        return down, across

    def use_matmul(self, examples: int) -> bool:
        """Return whether one batched matrix product over tasks is faster than a grouped convolution."""
        return examples * math.prod(self.out) <= _MAX_MATMUL_ROWS


def conv2d(x: Tensor, weight: Tensor, *, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """Convolve images ``[T, B, C, H, W]`` with weights ``[T, O, C, h, w]`` to ``[T, B, O, H', W']``, without bias."""
    image, window = (x.shape[-2], x.shape[-1]), (weight.shape[-2], weight.shape[-1])
    return _conv(x, weight, ConvGeometry(stride, padding, image, window))


class _Bilinear(Kernel):
    """Base of the three products, whose derivatives are again such products."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        a, b, ctx.geometry = inputs
        ctx.save_for_backward(a, b)
        ctx.save_for_forward(a, b)

    @classmethod
    def jvp(cls, ctx: Any, da: Tensor | None, db: Tensor | None, _: None) -> Any:
        """Return da b + a db, for the tangents that are not ``None``."""
        a, b = ctx.saved_tensors
        terms = [(da, b)] if da is not None else []
        terms += [(a, db)] if db is not None else []
        values = [cls.apply(*pair, ctx.geometry) for pair in terms]
        return sum(values[1:], values[0]) if values else None


class _WithWeight(_Bilinear):
    """Base of the products of images with a weight."""

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        """Treat the mapped images as more examples if they share the weight."""
        if in_dims[1] is not None:
            return super().vmap(info, in_dims, *args)
        images, weight, geometry = args
        out = cls.apply(images.movedim(in_dims[0], 1).flatten(1, 2), weight, geometry)  # from [T, V, B, ...]
        return out.unflatten(1, (info.batch_size, -1)), 1


class _Conv(_WithWeight):
    @staticmethod
    def forward(x: Tensor, w: Tensor, geometry: ConvGeometry) -> Tensor:
        tasks = w.shape[0]
        if _is_shared(w, tasks=len(x)):
            y = torch.conv3d(_as_volumes(x), w[0].unsqueeze(-1), None, (*geometry.stride, 1), (*geometry.padding, 0))
            return _from_volumes(y).data
        if geometry.use_matmul(x.shape[1]):
            return _unflatten_positions(_im2col(x, geometry) @ _weight_matrix(w).mT, x.shape[1], geometry.out).data
        y = torch.conv2d(
            merge_tasks_into_channels(x), w.flatten(0, 1), None, geometry.stride, geometry.padding, 1, tasks
        )
        return split_tasks_from_channels(y, tasks).data  # no view: layers may write to it

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w = ctx.saved_tensors
        geometry, (first, second, _) = ctx.geometry, ctx.needs_input_grad
        return (
            _conv_input_grad(g, w, geometry) if first else None,
            _conv_weight_grad(x, g, geometry) if second else None,
            None,
        )


class _ConvInputGrad(_WithWeight):
    @staticmethod
    def forward(g: Tensor, w: Tensor, geometry: ConvGeometry) -> Tensor:
        tasks, examples = g.shape[:2]
        if _is_shared(w, tasks=len(g)):
            like = g.new_empty(examples, *geometry.image, tasks, w.shape[2]).permute(0, 4, 1, 2, 3)
            return _from_volumes(
                _convolution_backward(_as_volumes(g), like, w[0].unsqueeze(-1), geometry, of_input=True)
            )
        if geometry.use_matmul(examples):
            return _col2im(_flatten_positions(g) @ _weight_matrix(w), examples, geometry)
        like = g.new_empty(examples, *geometry.image, tasks * w.shape[2]).permute(0, 3, 1, 2)
        groups = merge_tasks_into_channels(g), like, w.flatten(0, 1)
        x = _convolution_backward(*groups, geometry, tasks, of_input=True)
        return split_tasks_from_channels(x, tasks)

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> Any:
        g, w = ctx.saved_tensors
        geometry, (first, second, _) = ctx.geometry, ctx.needs_input_grad
        return _conv(x, w, geometry) if first else None, _conv_weight_grad(x, g, geometry) if second else None, None


class _ConvWeightGrad(_Bilinear):
    @staticmethod
    def forward(x: Tensor, g: Tensor, geometry: ConvGeometry) -> Tensor:
        tasks, outputs, inputs = g.shape[0], g.shape[2], x.shape[2]
        if geometry.use_matmul(x.shape[1]):
            matrix = _flatten_positions(g).mT @ _im2col(x, geometry)
            return matrix.view(tasks, outputs, *geometry.window, inputs).permute(0, 1, 4, 2, 3)
        like = g.new_empty(tasks * outputs, *geometry.window, inputs).permute(0, 3, 1, 2)
        return _convolution_backward(
            merge_tasks_into_channels(g), merge_tasks_into_channels(x), like, geometry, tasks, of_input=False
        ).unflatten(0, (tasks, outputs))

    @staticmethod
    def backward(ctx: Any, w: Tensor) -> Any:
        x, g = ctx.saved_tensors
        geometry, (first, second, _) = ctx.geometry, ctx.needs_input_grad
        return _conv_input_grad(g, w, geometry) if first else None, _conv(x, w, geometry) if second else None, None


_conv, _conv_input_grad, _conv_weight_grad = _Conv.apply, _ConvInputGrad.apply, _ConvWeightGrad.apply


def _convolution_backward(
    g: Tensor, x: Tensor, w: Tensor, geometry: ConvGeometry, groups: int = 1, *, of_input: bool
) -> Tensor:
    """Compute one of the two products by torch's kernel; the third tensor only gives shape and layout."""
    stride, padding = (*geometry.stride, 1)[: g.ndim - 2], (*geometry.padding, 0)[: g.ndim - 2]
    one, none = [1] * len(stride), [0] * len(stride)
    grads = torch.ops.aten.convolution_backward(
        g, x, w, None, stride, padding, one, False, none, groups, (of_input, not of_input, False)
    )
    return grads[0] if of_input else grads[1]


def _is_shared(w: Tensor, *, tasks: int) -> bool:
    """Return whether several tasks have one weight, as ``expand`` repeats it."""
    return w.shape[0] == tasks > 1 and w.stride(0) == 0


def _as_volumes(x: Tensor) -> Tensor:
    """View ``[T, B, C, H, W]`` as ``[B, C, H, W, T]``, channels last."""
    return x.permute(1, 2, 3, 4, 0)


def _from_volumes(x: Tensor) -> Tensor:
    """View ``[B, C, H, W, T]`` as ``[T, B, C, H, W]`` in the layout of the kernels."""
    return to_kernel_layout(x.permute(4, 0, 1, 2, 3))


def _weight_matrix(w: Tensor) -> Tensor:
    """Reshape ``[T, O, C, h, w]`` to ``[T, O, h * w * C]``."""
    return w.permute(0, 1, 3, 4, 2).flatten(2)


def _flatten_positions(y: Tensor) -> Tensor:
    """Reshape ``[T, B, O, H', W']`` to ``[T, B * H' * W', O]``."""
    return y.permute(0, 1, 3, 4, 2).flatten(1, 3)


def _unflatten_positions(rows: Tensor, examples: int, size: tuple[int, int]) -> Tensor:
    """Reshape ``[T, B * H' * W', O]`` to ``[T, B, O, H', W']``."""
    return to_kernel_layout(rows.unflatten(1, (examples, *size)).permute(0, 1, 4, 2, 3))


def _im2col(x: Tensor, geometry: ConvGeometry) -> Tensor:
    """Return the patch under the kernel at each position, as rows ``[T, B * H' * W', h * w * C]``."""
    (down, across), (top, side) = geometry.stride, geometry.padding
    padded = torch.nn.functional.pad(x.permute(1, 3, 4, 0, 2), (0, 0, 0, 0, side, side, top, top))
    examples, _, _, tasks, channels = padded.shape
    b, i, j, t, c = padded.stride()
    patches = padded.as_strided(
        (tasks, examples, *geometry.out, *geometry.window, channels), (t, b, down * i, across * j, i, j, c)
    )
    return patches.reshape(tasks, examples * math.prod(geometry.out), -1)


def _col2im(rows: Tensor, examples: int, geometry: ConvGeometry) -> Tensor:
    """Apply the transpose of ``_im2col``: each pixel is the sum over its patches."""
    (down, across), (top, side) = geometry.stride, geometry.padding
    (height, width), (out_height, out_width) = geometry.image, geometry.out
    tasks, channels = rows.shape[0], rows.shape[2] // math.prod(geometry.window)
    patches = rows.view(tasks, examples, out_height, out_width, *geometry.window, channels).permute(1, 2, 3, 0, 6, 4, 5)
    if uses_torch_kernels(rows):
        columns = patches.permute(0, 3, 4, 5, 6, 1, 2).flatten(5).flatten(1, 4)  # [B, T * C * h * w, H' * W']
        x = torch.nn.functional.fold(
            columns, geometry.image, geometry.window, padding=geometry.padding, stride=geometry.stride
        )
        return split_tasks_from_channels(x, tasks)
    padded = rows.new_zeros(examples, height + 2 * top, width + 2 * side, tasks, channels)
    for i in range(geometry.window[0]):
        for j in range(geometry.window[1]):
            padded[:, i : i + down * out_height : down, j : j + across * out_width : across] += patches[..., i, j]
    inside = padded[:, top : top + height, side : side + width].contiguous()
    return inside.permute(3, 0, 4, 1, 2)
