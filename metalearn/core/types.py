"""The data types: parameters, episodes, and the result of a meta-gradient.

Symbols, with one spelling everywhere: T tasks, N ways, S support examples per task, Q query examples per task,
K inner steps; ``theta`` meta-parameters, ``fast`` adapted parameters ``[T, ...]``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields

from torch import Tensor

from metalearn.core.deprecation import renamed
from metalearn.core.short_repr import short_repr

Params = dict[str, Tensor]
"""Named parameters of one model (``theta``), or of T adapted copies stacked along dimension 0 (``fast``)."""

Forward = Callable[[Params, Tensor], Tensor]
"""``forward(params, x) -> prediction``: pure, for one task; ``x`` is ``[S or Q, ...]``."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""``loss(prediction, target) -> scalar``: for one task, the mean over its examples."""


def check_tensors(values: Mapping[str, object]) -> None:
    """Raise ``TypeError`` for what is no tensor, and ``ValueError`` for a meta tensor, which holds no values."""
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is {type(value).__name__} and must be a Tensor; convert it with torch.as_tensor.")
        if value.is_meta:
            raise ValueError(f"{name} is on the meta device and holds no values; give a tensor on the CPU or a GPU.")


def check_examples(name: str, x: Tensor, y: Tensor) -> None:
    """Check that inputs ``[T, examples, ...]`` and targets of the set ``name`` belong together.

    Raises:
        TypeError: if one is no tensor.
        ValueError: if the shapes do not match, or a set is empty.
    """
    check_tensors({f"{name}_x": x, f"{name}_y": y})
    shapes = {f"{name}_x": tuple(x.shape), f"{name}_y": tuple(y.shape)}
    for tensor, shape in shapes.items():
        if len(shape) < 2:
            raise ValueError(f"{tensor} has shape {shape}; it must lead with [tasks, examples].")
    if x.shape[:2] != y.shape[:2]:
        raise ValueError(f"{name}_x and {name}_y must lead with the same numbers of tasks and examples, got {shapes}.")
    if x.shape[0] == 0 or x.shape[1] == 0:
        raise ValueError(
            f"the {name} set is empty, {name}_x has shape {shapes[f'{name}_x']}; give at least one example."
        )


@dataclass(frozen=True, eq=False)  # tensors have no single truth to compare by
class Episodes:
    """A batch of T few-shot tasks; every tensor leads with the task dimension.

    Args:
        support_x: inputs to adapt on, ``[T, S, ...]``, floating point.
        support_y: their targets, ``[T, S]`` int64 class labels or ``[T, S, ...]`` regression targets.
        query_x: inputs that the adapted parameters are judged on, ``[T, Q, ...]``.
        query_y: their targets, ``[T, Q]`` or ``[T, Q, ...]``.

    Raises:
        TypeError: if one is no tensor.
        ValueError: if the tensors disagree on T, on S or on Q, or if there is no task or an empty set.
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor

    __repr__ = short_repr

    def __post_init__(self) -> None:
        check_examples("support", self.support_x, self.support_y)
        check_examples("query", self.query_x, self.query_y)
        shapes = {f.name: tuple(getattr(self, f.name).shape) for f in fields(self)}
        if len({shape[0] for shape in shapes.values()}) != 1:
            raise ValueError(f"Episodes: every tensor must lead with the same number of tasks T, got {shapes}.")

    @property
    def tasks(self) -> int:
        """T, the number of tasks."""
        return self.support_x.shape[0]

    def split(self, size: int) -> list[Episodes]:
        """Split into batches of at most ``size`` tasks, in order."""
        parts = (getattr(self, f.name).split(size) for f in fields(self))
        return [Episodes(*tensors) for tensors in zip(*parts, strict=True)]


@renamed(figures="diagnostics")
@dataclass(frozen=True, eq=False)
class MetaGradient:
    """The result of every engine.

    Args:
        loss: mean query loss over tasks, a detached scalar.
        grads: d loss / d theta, named and shaped like the parameters; zeros where the loss does not reach.
        predictions: of the adapted parameters on the query sets, detached, ``[T, Q, ...]``.
        support_loss: mean support loss over tasks before each inner step, detached, ``[K]``.
        diagnostics: scalars that the engine reports for logging, by name, detached.
    """

    loss: Tensor
    grads: Params
    predictions: Tensor
    support_loss: Tensor
    diagnostics: Mapping[str, Tensor] = field(default_factory=dict)

    __repr__ = short_repr
