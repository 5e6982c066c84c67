"""What the kernels share: every tensor leads with the task dimension T, and ``vmap`` adds to it.

Images are ``[T, B, C, H, W]``, B examples a task. In memory they lie as ``[B, H, W, T, C]``, which is a batch of B
images of T * C channels, channels last: what oneDNN's grouped convolutions and torch's BatchNorm take as it is, one
group a task. ``merge_tasks_into_channels`` and ``split_tasks_from_channels`` are the two views of it; neither copies
what is laid out so already.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack, is_legacy_batchedtensor
from torch._functorch.autograd_function import custom_function_call


def merge_tasks_into_channels(x: Tensor) -> Tensor:
    """``[T, B, C, H, W]`` to ``[B, T * C, H, W]``, channels last; copies what lies otherwise."""
    tasks, examples, channels, height, width = x.shape
    last = x.permute(1, 3, 4, 0, 2).contiguous()
    return last.view(examples, height, width, tasks * channels).permute(0, 3, 1, 2)


def split_tasks_from_channels(x: Tensor, tasks: int) -> Tensor:
    """``[B, T * C, H, W]``, channels last, to ``[T, B, C, H, W]``."""
    examples, channels, height, width = x.shape
    last = x.permute(0, 2, 3, 1).contiguous()
    return last.view(examples, height, width, tasks, channels // tasks).permute(3, 0, 4, 1, 2)


def to_kernel_layout(x: Tensor) -> Tensor:
    """``[T, B, C, H, W]``, lying as it should."""
    return split_tasks_from_channels(merge_tasks_into_channels(x), x.shape[0])


def fold_vmap_dim(info: Any, in_dims: tuple[int | None, ...], args: tuple[Any, ...]) -> list[Any]:
    """The arguments of a kernel under ``vmap``, with the mapped dimension made part of T; others are repeated."""
    return [
        a if not isinstance(a, Tensor) else _lead(a, dim, info.batch_size).flatten(0, 1)
        for a, dim in zip(args, in_dims, strict=True)
    ]


def unfold_vmap_dim(out: Tensor, size: int) -> Tensor:
    """The reverse, for a result: ``[size * T, ...]`` to ``[size, T, ...]``."""
    parts: Tensor = out.unflatten(0, (size, -1))
    return parts


def _lead(x: Tensor, dim: int | None, size: int) -> Tensor:
    led: Tensor = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return led


def per_channel_view(per_channel: Tensor) -> Tensor:
    """``[T * C]`` shaped to go with ``[B, T * C, H, W]``."""
    return per_channel.view(1, -1, 1, 1)


def forward_over_forward() -> bool:
    """Whether two forward modes are nested here."""
    if not torch._C._are_functorch_transforms_active():
        return False
    return sum(level.key() == TransformType.Jvp for level in get_interpreter_stack() or ()) > 1


class Kernel(torch.autograd.Function):
    """A ``torch.autograd.Function`` for ``torch.func``, with a twin for plain autograd.

    torch binds the arguments of a Function with ``setup_context`` to its signature at every call, which takes longer
    than a small kernel; the twin has none.
    """

    _twin: Any

    def __init_subclass__(cls) -> None:
        def forward(ctx: Any, *args: Any) -> Any:
            output = cls.forward(*args)
            cls.setup_context(ctx, args, output)
            return output

        rules = {"forward": staticmethod(forward), "backward": staticmethod(cls.backward), "jvp": staticmethod(cls.jvp)}
        cls._twin = type(f"{cls.__name__}Twin", (torch.autograd.Function,), rules)

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """As ``torch.autograd.Function.apply``, by position.

        Raises:
            NotImplementedError: under forward mode within forward mode, where torch does not differentiate a Function's
                rule for it, and under ``is_grads_batched``, which knows no rule of ours.
        """
        if torch._C._are_functorch_transforms_active():
            if forward_over_forward():
                raise NotImplementedError(f"{cls.__name__}: forward-mode AD within forward-mode AD; take reverse mode")
            return custom_function_call(cls, *args)
        if any(isinstance(a, Tensor) and is_legacy_batchedtensor(a) for a in args):
            raise NotImplementedError(f"{cls.__name__}: is_grads_batched=True is not offered; loop, or use torch.func")
        return cls._twin.apply(*args)
