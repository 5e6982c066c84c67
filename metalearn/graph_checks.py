"""Checks on the graph that a model builds, where torch would take its second derivative wrongly and say nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@contextmanager
def nothing_run_again() -> Iterator[None]:
    """Refuse activation checkpointing inside a model: what it runs again on the way back has the module's own weights,
    as ``functional_call`` has put them back by then, and the gradient is wrong.

    It is seen by its saved-tensor hooks, and not inside of the caller's own.

    Raises:
        ValueError: naming what to do.
    """
    with ExitStack() as stack:
        with suppress(RuntimeError):  # the caller's hooks
            stack.enter_context(torch.autograd.graph.disable_saved_tensors_hooks(RUN_AGAIN))
        try:
            yield
        except RuntimeError as error:
            if str(error) != RUN_AGAIN:
                raise
            raise ValueError(RUN_AGAIN) from None


RUN_AGAIN = (
    "torch.utils.checkpoint (or another saved-tensor hook) inside of a model runs its layers again on the way back, "
    "when they no longer have the parameters that they were called with, so that the gradient would be wrong. Call the "
    "layers without it; InnerLoop(engine='checkpoint') and task_chunk save memory instead."
)


def check_twice_differentiable(value: Tensor) -> None:
    """Refuse a graph with an ``autograd.Function`` that is marked ``@once_differentiable``.

    torch takes what its backward returns as a constant, without an error where the incoming gradient is one.

    Raises:
        ValueError: naming the Function.
    """
    seen: set[Any] = set()
    nodes: list[Any] = [value.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        function = _function_of(getattr(node, "_forward_cls", None))  # of Functions that are written in Python
        if function is not None and getattr(function.backward, "__code__", None) is _ONCE:
            raise ValueError(
                f"{function.__name__}, an autograd.Function of the model or the loss, is marked @once_differentiable: "
                "it has no second derivative. Remove the mark, if its backward is made of differentiable operations; "
                "or take second_order=False: first-order MAML."
            )
        nodes += [following for following, _ in node.next_functions]


def _function_of(function: Any) -> Any:
    """Return the user's Function, of which ``vmap`` has made one of its own, whose backward knows it."""
    if not getattr(function, "__module__", "").startswith("torch._functorch"):
        return function
    known = [cell.cell_contents for cell in function.backward.__closure__ or ()]
    inner = [c for c in known if isinstance(c, type) and issubclass(c, torch.autograd.Function) and c is not function]
    return _function_of(inner[0]) if inner else function


_ONCE = once_differentiable(lambda ctx: None).__code__
