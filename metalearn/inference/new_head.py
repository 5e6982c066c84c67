"""Adapt to another number of classes than in training, if the algorithm can.

Fewer classes take as many outputs of the trained head: classes are exchangeable, as tasks number them at random. More
classes need a new head, which is built from the support set:

    w_n = 2 c_n,    b_n = -|c_n|^2,    c_n = mean of f(x) over the support examples of class n

(Snell et al. 2017, arXiv 1703.05175, eq. 8.) The algorithm's usual inner steps start from either.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metalearn.core.errors import RunError
from metalearn.core.text import plural
from metalearn.core.types import Forward, Params
from metalearn.inner import Initializer, InnerLoop, MetaCurvature, PrototypeHead, params_at_step

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrototypeInitializer:
    """An initializer for ``InnerLoop``: the head is ``PrototypeHead``'s, all other parameters are theta's.

    Embeddings are computed with the first step's value of the parameters ``per_step``.
    """

    head: PrototypeHead
    per_step: frozenset[str]

    def __call__(self, forward: Forward, fast: Params, support_x: Tensor, support_y: Tensor) -> Params:
        """Return ``fast`` with the new head."""
        first = params_at_step(fast, InnerLoop(lr=1.0, steps=0, per_step_params=self.per_step), 0)
        made = self.head(forward, first, support_x, support_y)
        return {**fast, **{name: made[name] for name in (self.head.weight, self.head.bias)}}


@dataclass(frozen=True)
class FirstOutputs:
    """An initializer for ``InnerLoop``: the first outputs of the trained head, and all other parameters of theta."""

    head: tuple[str, ...]
    ways: int
    per_step: frozenset[str]

    def __call__(self, forward: Forward, fast: Params, support_x: Tensor, support_y: Tensor) -> Params:
        """Return ``fast`` with the smaller head."""
        return {
            **fast,
            **{name: fast[name].narrow(2 if name in self.per_step else 1, 0, self.ways) for name in self.head},
        }


@dataclass(frozen=True)
class CurvatureOfNewHead:
    """``MetaCurvature`` with a head of other classes than it was learned for.

    Classes are exchangeable, so what is learned along them is taken as the same for each class, and for each pair:

        M = d I + e (1 1^T - I),    d and e the means of the learned diagonal and of the other entries
    """

    weight: str
    bias: str
    ways: int

    def init(self, params: Params) -> Params:
        """Return what ``MetaCurvature`` learns, for the trained head."""
        return MetaCurvature().init(params)

    def apply(self, k: int, grads: Params, learned: Params) -> Params:
        """Return the gradients of the new head and of all other parameters, multiplied."""
        matrix, scale = learned[f"{self.weight}/out"], learned[f"{self.bias}/scale"]  # [T, N, N], [T, N]
        n = matrix.shape[-1]
        diagonal = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)
        others = (matrix.sum((-2, -1)) - n * diagonal) / (n * (n - 1))
        eye = torch.eye(self.ways, dtype=matrix.dtype, device=matrix.device)
        resized = {
            f"{self.weight}/out": diagonal[:, None, None] * eye + others[:, None, None] * (1 - eye),
            f"{self.bias}/scale": scale.mean(-1, keepdim=True).expand(-1, self.ways),
        }
        return MetaCurvature().apply(k, grads, learned | resized)


def inner_for_ways(inner: InnerLoop, ways: int, *, trained: int, algorithm: str, head: Sequence[str]) -> InnerLoop:
    """Return the inner loop of a task of ``ways`` classes, where the run was trained for ``trained``.

    Raises:
        RunError: if the algorithm, or a model with these parameters in its ``head``, only supports ``trained`` classes.
    """
    if ways == trained:
        return inner
    if why := _why_ways_fixed(inner, algorithm, head):
        raise RunError(
            f"{ways} classes, and the run was trained for task.ways={trained}: {why}. Give {trained} classes, train "
            f"with task.ways={ways}, or use another algorithm, such as maml or protonet."
        )
    weight, bias = head
    initializer: Initializer = PrototypeInitializer(PrototypeHead(weight, bias, ways=ways), inner.per_step_params)
    if inner.initializer is None:  # else it is ProtoNet's, which builds its head for any number of classes
        how = "the head was built from the classes' mean embeddings (prototypes)"
        if ways < trained:
            initializer, how = (
                FirstOutputs((weight, bias), ways, inner.per_step_params),
                "as many outputs of the trained head were taken",
            )
        log.warning(
            "The run was trained for %d classes, and these are %d: %s, and %s.",
            *(trained, ways, how, f"{plural(inner.steps, 'inner step')} follow{'s' if inner.steps == 1 else ''}"),
        )
    adapted = inner.adapted_params is None or inner.adapted_params & set(head)
    return dataclasses.replace(
        inner,
        initializer=initializer,
        transform=CurvatureOfNewHead(weight, bias, ways)
        if inner.transform is not None and adapted
        else inner.transform,
    )


def _why_ways_fixed(inner: InnerLoop, algorithm: str, head: Sequence[str]) -> str | None:
    """Return why the number of classes cannot change; ``None`` if it can."""
    if inner.initializer is not None and not isinstance(inner.initializer, PrototypeHead):
        return f"the head of algorithm={algorithm} is shared by all tasks and never adapted, so it has no other size"
    if len(head) != 2:
        return "the model has no linear head with a bias, which could be built for other classes"
    if inner.learned_lr == "parameter" and (inner.adapted_params is None or inner.adapted_params & set(head)):
        return f"algorithm={algorithm} has learned a step size for every entry of its head, and none for another head"
    if type(inner.transform) not in (type(None), MetaCurvature):
        return f"{type(inner.transform).__name__} has learned what fits this head, and may not fit another"
    return None
