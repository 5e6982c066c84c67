"""What a task begins with, where that is not theta itself: for ``InnerLoop.start``.

Each is a function of T stacked copies of theta and the support sets, and differentiable in theta.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from metalearn.core.errors import OUT_OF_MEMORY
from metalearn.core.types import Forward, Params
from metalearn.inner.losses import task_predictions


@dataclass(frozen=True)
class ZeroContext:
    """phi_0 = 0: context parameters that every task begins anew, so that theta's own stay what they are.

    Args:
        names: of the context parameters.

    Reference: Zintgraf et al. 2019 (CAVIA), arXiv 1810.03642, algorithm 1.
    """

    names: frozenset[str]

    def __call__(self, forward: Forward, fast: Params, support_x: Tensor, support_y: Tensor) -> Params:
        """As ``metalearn.inner.Start``."""
        return {**fast, **{name: torch.zeros_like(fast[name]) for name in self.names}}


@dataclass(frozen=True)
class PrototypeHead:
    """A linear head that classifies by the nearest class mean of the support set's embeddings.

        c_n = mean of f(x) over the support examples of class n
        -|f(x) - c_n|^2 = 2 c_n . f(x) - |c_n|^2 - |f(x)|^2

    so that ``weight = 2 c`` and ``bias = -|c|^2`` give the same softmax, the last term being the same for all classes.
    The embedding f is the model with the identity in the place of its head, which this does to a linear layer only.

    Args:
        weight: name of the head's weight, ``[N, D]``.
        bias: name of its bias, ``[N]``.
        ways: N; ``None``: as many as the head has.

    Reference: Snell et al. 2017, arXiv 1703.05175, eq. 1, 2 and 8; Triantafillou et al. 2020, arXiv 1903.03096, for the
    head that is then adapted (Proto-MAML).
    """

    weight: str
    bias: str
    ways: int | None = None

    def __call__(self, forward: Forward, fast: Params, support_x: Tensor, support_y: Tensor) -> Params:
        """As ``metalearn.inner.Start``."""
        ways = self.ways or fast[self.weight].shape[1]
        means = class_means(embeddings(forward, fast, support_x, self.weight, self.bias), support_y, ways)
        return {**fast, self.weight: 2 * means, self.bias: -(means * means).sum(dim=-1)}


def embeddings(forward: Forward, fast: Params, x: Tensor, weight: str, bias: str) -> Tensor:
    """f(x) ``[T, examples, D]``: what the head is given, for ``x`` ``[T, examples, ...]``.

    Raises:
        ValueError: if the layer is not the one that gives the outputs.
    """
    head = fast[weight]
    tasks, width = head.shape[0], head.shape[-1]
    identity = torch.eye(width, dtype=head.dtype, device=head.device).expand(tasks, width, width)
    wrong = (
        f"'{weight}' does not belong to the model's head: with the identity in its place the outputs are not the "
        f"{width} features that it takes. Name the linear layer that gives the outputs: parts_of(module, head=...)."
    )
    try:
        embedded = task_predictions(forward, {**fast, weight: identity, bias: head.new_zeros(tasks, width)}, x)
    except (RuntimeError, ValueError) as error:
        if re.search(OUT_OF_MEMORY, str(error)):
            raise
        task_predictions(forward, fast, x)  # what fails under the model's own weights is another matter
        raise ValueError(wrong) from error
    if embedded.shape[-1] != width:
        raise ValueError(wrong)
    return embedded


def class_means(embedded: Tensor, labels: Tensor, ways: int) -> Tensor:
    """Means over the examples of each class, ``[T, N, D]``, of ``[T, S, D]`` with labels ``[T, S]``.

    A class without an example has the mean 0.
    """
    members = (labels.unsqueeze(1) == torch.arange(ways, device=labels.device).view(1, -1, 1)).to(embedded.dtype)
    return members @ embedded / members.sum(dim=-1, keepdim=True).clamp(min=1)
