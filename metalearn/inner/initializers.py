"""Initial parameters of a task that are not theta itself, for ``InnerLoop.initializer``; differentiable in theta."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metalearn.core.errors import is_out_of_memory
from metalearn.core.types import Forward, Params
from metalearn.inner.losses import task_predictions


@dataclass(frozen=True)
class ZeroContext:
    """phi_0 = 0: every task starts with zero context parameters ``names``, and theta's are never changed.

    Reference: Zintgraf et al. 2019 (CAVIA), arXiv 1810.03642, algorithm 1.
    """

    names: frozenset[str]

    def __call__(self, forward: Forward, fast: Params, support_x: Tensor, support_y: Tensor) -> Params:
        """Return ``fast`` with zero context parameters."""
        return {**fast, **{name: torch.zeros_like(fast[name]) for name in self.names}}


@dataclass(frozen=True)
class PrototypeHead:
    """A linear head that classifies by the nearest class mean of the support set's embeddings.

        c_n = mean of f(x) over the support examples of class n
        -|f(x) - c_n|^2 = 2 c_n . f(x) - |c_n|^2 - |f(x)|^2

    ``weight = 2 c`` and ``bias = -|c|^2`` give the same softmax, as the last term is the same for all classes.
    A class that a task's support set lacks has probability 0. The embedding f is the model with the identity in the
    place of its linear head.

    Args:
        weight: name of the head's weight, ``[N, D]``.
        bias: name of its bias, ``[N]``.
        ways: N; ``None``: the head's number of outputs.

    Reference: Snell et al. 2017, arXiv 1703.05175, eq. 1, 2 and 8; Triantafillou et al. 2020, arXiv 1903.03096, for
    adapting the head further (Proto-MAML).
    """

    weight: str
    bias: str
    ways: int | None = None

    def __call__(self, forward: Forward, fast: Params, support_x: Tensor, support_y: Tensor) -> Params:
        """Return ``fast`` with the head that classifies by class means."""
        ways = self.ways or fast[self.weight].shape[1]
        embedded = embeddings(forward, fast, support_x, self.weight, self.bias)  # [T, S, D]
        classes = torch.arange(ways, device=support_y.device).view(1, -1, 1)
        members = (support_y.unsqueeze(1) == classes).to(embedded.dtype)  # [T, N, S]
        counts = members.sum(dim=-1)
        means = members @ embedded / counts.unsqueeze(-1).clamp(min=1)
        never = torch.finfo(embedded.dtype).min / 2  # the score of a class without an example
        return {**fast, self.weight: 2 * means, self.bias: torch.where(counts > 0, -(means * means).sum(dim=-1), never)}


def embeddings(forward: Forward, fast: Params, x: Tensor, weight: str, bias: str) -> Tensor:
    """Return f(x) ``[T, examples, D]``, the inputs of the head, for ``x`` ``[T, examples, ...]``.

    Raises:
        ValueError: if the layer is not the one that gives the outputs.
    """
    head = fast[weight]
    tasks, width = head.shape[0], head.shape[-1]
    identity = torch.eye(width, dtype=head.dtype, device=head.device).expand(tasks, width, width)
    wrong_layer = (
        f"'{weight}' does not belong to the model's head: with the identity in its place the outputs are not the "
        f"{width} features that it takes. Name the linear layer that gives the outputs: module_parts(module, head=...)."
    )
    try:
        embedded = task_predictions(forward, {**fast, weight: identity, bias: head.new_zeros(tasks, width)}, x)
    except (RuntimeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        task_predictions(forward, fast, x)  # raises if the model fails under its own weights as well
        raise ValueError(wrong_layer) from error
    if embedded.shape[-1] != width:
        raise ValueError(wrong_layer)
    return embedded
