"""Memory layout and base class of the kernels: every tensor leads with the task dimension T, which ``vmap`` extends.

Images are ``[T, B, C, H, W]``, B examples per task. In memory they are ``[B, H, W, T, C]``: B images of T * C channels,
channels last, as oneDNN's grouped convolutions (one group per task) and torch's BatchNorm read them.
``merge_tasks_into_channels`` and ``split_tasks_from_channels`` are the two views; neither copies tensors in this
layout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack, is_legacy_batchedtensor
from torch._functorch.autograd_function import custom_function_call


def merge_tasks_into_channels(x: Tensor) -> Tensor:
    """View ``[T, B, C, H, W]`` as ``[B, T * C, H, W]``, channels last; copy if the layout differs."""
    tasks, examples, channels, height, width = x.shape
    last = x.permute(1, 3, 4, 0, 2).contiguous()
    return last.view(examples, height, width, tasks * channels).permute(0, 3, 1, 2)


def split_tasks_from_channels(x: Tensor, tasks: int) -> Tensor:
    """View ``[B, T * C, H, W]``, channels last, as ``[T, B, C, H, W]``; copy if the layout differs."""
    examples, channels, height, width = x.shape
    last = x.permute(0, 2, 3, 1).contiguous()
    return last.view(examples, height, width, tasks, channels // tasks).permute(3, 0, 4, 1, 2)


def to_kernel_layout(x: Tensor) -> Tensor:
    """Return ``[T, B, C, H, W]`` in the layout of the kernels."""
    return split_tasks_from_channels(merge_tasks_into_channels(x), x.shape[0])


def per_channel_view(per_channel: Tensor) -> Tensor:
    """View ``[T * C]`` for broadcasting with ``[B, T * C, H, W]``."""
    return per_channel.view(1, -1, 1, 1)


def uses_torch_kernels(x: Tensor) -> bool:
    """Return whether torch's kernel of a whole layer is used: on GPUs, where it is exact enough and one launch."""
    return x.is_cuda


def forward_over_forward() -> bool:
    """Return whether two forward modes are nested here."""
    if not torch._C._are_functorch_transforms_active():
        return False
    return sum(level.key() == TransformType.Jvp for level in get_interpreter_stack() or ()) > 1


class Kernel(torch.autograd.Function):
    """A ``torch.autograd.Function`` for ``torch.func``, with a second class for plain autograd.

    torch binds the arguments of a Function with ``setup_context`` to its signature at every call, which takes longer
    than a small kernel; the second class has no ``setup_context``.
    """

    _plain_autograd: Any

    def __init_subclass__(cls) -> None:
        def forward(ctx: Any, *args: Any) -> Any:
            output = cls.forward(*args)
            cls.setup_context(ctx, args, output)
            return output

        rules = {"forward": staticmethod(forward), "backward": staticmethod(cls.backward), "jvp": staticmethod(cls.jvp)}
        cls._plain_autograd = type(f"{cls.__name__}Plain", (torch.autograd.Function,), rules)

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Call the Function like ``torch.autograd.Function.apply``, with positional arguments.

        Raises:
            NotImplementedError: under nested forward modes, where torch does not differentiate the Function's rule, and
                under ``is_grads_batched``, which ignores its ``vmap`` rule.
        """
        if torch._C._are_functorch_transforms_active():
            if forward_over_forward():
                raise NotImplementedError(f"{cls.__name__}: forward-mode AD within forward-mode AD; take reverse mode")
            return custom_function_call(cls, *args)
        if any(isinstance(a, Tensor) and is_legacy_batchedtensor(a) for a in args):
            raise NotImplementedError(f"{cls.__name__}: is_grads_batched=True is not offered; loop, or use torch.func")
        return cls._plain_autograd.apply(*args)

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        """Call the kernel with the mapped dimension merged into T; arguments that are not mapped are repeated."""
        size, folded = info.batch_size, list(args)
        for i, (a, dim) in enumerate(zip(args, in_dims, strict=True)):
            if isinstance(a, Tensor):
                folded[i] = (a.expand(size, *a.shape) if dim is None else a.movedim(dim, 0)).flatten(0, 1)
        out = cls.apply(*folded)
        if isinstance(out, tuple):
            return tuple(part.unflatten(0, (size, -1)) for part in out), (0,) * len(out)
        return out.unflatten(0, (size, -1)), 0
