"""Check the graph of a model for operations whose second derivative torch silently gets wrong."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor


@contextmanager
def forbid_activation_checkpointing() -> Iterator[None]:
    """Raise ``ValueError`` for activation checkpointing inside a model.

    It runs layers again in the backward pass, when the module has its own weights again and not those of the task. It
    is recognised by its saved-tensor hooks, unless the caller has installed hooks too.
    """
    with ExitStack() as stack:
        with suppress(RuntimeError):  # the caller's hooks
            stack.enter_context(torch.autograd.graph.disable_saved_tensors_hooks(ACTIVATION_CHECKPOINT_ERROR))
        try:
            yield
        except RuntimeError as error:
            if str(error) != ACTIVATION_CHECKPOINT_ERROR:
                raise
            raise ValueError(ACTIVATION_CHECKPOINT_ERROR) from None


ACTIVATION_CHECKPOINT_ERROR = (
    "torch.utils.checkpoint (or another saved-tensor hook) inside a model runs its layers again in the backward pass, "
    "when they no longer have the parameters that they were called with, so that the gradient would be wrong. Call the "
    "layers without it; InnerLoop(engine='checkpoint') and task_chunk save memory instead."
)


def check_twice_differentiable(value: Tensor, inputs: Iterable[Tensor] = ()) -> None:
    """Raise ``ValueError`` for an ``autograd.Function`` whose backward torch silently treats as a constant.

    That is one marked ``@once_differentiable``, or one that leaves autograd by ``torch.no_grad`` or numpy. The graph of
    ``value`` is searched down to ``inputs``.
    """
    seen: set[Any] = {x.grad_fn for x in inputs} | {None}
    nodes: list[Any] = [value.grad_fn]
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        function = getattr(node, "_forward_cls", None)  # of Functions that are written in Python
        if function is not None and function.__module__ == "torch.utils.checkpoint":
            raise ValueError(ACTIVATION_CHECKPOINT_ERROR)
        if function is not None and not function.__module__.startswith("metalearn.") and _backward_is_constant(node):
            name = function.__name__.removeprefix("Vmapped")
            raise ValueError(
                f"the backward of {name}, an autograd.Function of the model or the loss, has no derivative: it is "
                "marked @once_differentiable, or leaves autograd by torch.no_grad() or numpy. Write it of operations "
                "with a derivative; or take second_order=False: first-order MAML."
            )
        nodes += [following for following, _ in node.next_functions]


def _backward_is_constant(node: Any) -> bool:
    """Return whether a Function's backward has a nonzero output that does not depend on its inputs, by trying it."""
    with torch.enable_grad():
        grads = [torch.ones(m.shape, dtype=m.dtype, device=m.device, requires_grad=True) for m in node._input_metadata]
        try:
            returned = node.apply(*grads)
        except Exception:  # of any kind, as it is the user's code; an error not due to this trial is raised again later
            return False
    for grad in returned if isinstance(returned, tuple) else (returned,):
        if not isinstance(grad, Tensor) or not grad.any():
            continue
        if not grad.requires_grad or (grad.grad_fn is not None and grad.grad_fn.name().endswith("Error")):
            return True
    return False
