"""The data types: parameters, episodes, and the result of a meta-gradient.

Symbols, with one spelling everywhere: T tasks, N ways, S support examples per task, Q query examples per task,
K inner steps; ``theta`` meta-parameters, ``fast`` adapted parameters ``[T, ...]``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import register_dataclass
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves, tree_map

from metalearn.core.deprecation import renamed
from metalearn.core.short_repr import short_repr

Params = dict[str, Tensor]
"""Named parameters of one model (``theta``), or of T adapted copies stacked along dimension 0 (``fast``)."""

Examples = Any
"""A tensor, or a pytree of tensors: a tuple, list, dictionary or dataclass. Each leads with the examples."""

Forward = Callable[..., Examples]
"""``forward(params, x) -> prediction``: pure, of one task, ``x`` ``[S or Q, ...]``. May take meta-learned tensors."""

Loss = Callable[..., Tensor]
"""``loss(prediction, target) -> scalar``: of one task, the mean over its examples. May take meta-learned tensors."""


def check_tensors(values: Mapping[str, object]) -> None:
    """Raise ``TypeError`` for what is no dense tensor, and ``ValueError`` for a meta tensor, which holds no values."""
    for name, value in values.items():
        if value is None:
            raise TypeError(f"{name} is None and must be a Tensor; give one, or leave it out.")
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is {type(value).__name__} and must be a Tensor; convert it with torch.as_tensor.")
        if value.is_nested or value.layout is not torch.strided:
            kind = "a nested tensor" if value.is_nested else f"stored as {value.layout}"
            remedy = "tasks of unequal size as a list of Episodes, or padded" if value.is_nested else "x.to_dense()"
            raise TypeError(f"{name} is {kind}, which torch.vmap cannot batch; give it dense: {remedy}.")
        if value.is_meta:
            raise ValueError(f"{name} is on the meta device and holds no values; give a tensor on the CPU or a GPU.")


def named_leaves(name: str, examples: Examples) -> dict[str, Tensor]:
    """Return the tensors of a pytree by what they are called in messages: ``x``, ``x[0]``, ``x['mask']``, ``x.mask``.

    A dataclass that torch does not know as a pytree is registered with it.

    Examples:
        >>> list(named_leaves("x", {"tokens": torch.zeros(2), "mask": torch.ones(2)}))
        ["x['tokens']", "x['mask']"]
    """
    leaves, _ = tree_flatten_with_path(examples)
    if unknown := {type(leaf) for _, leaf in leaves if is_dataclass(leaf)}:
        for kind in unknown:
            register_dataclass(kind)
        return named_leaves(name, examples)
    return {f"{name}{keystr(path)}": leaf for path, leaf in leaves}


def check_examples(name: str, x: Examples, y: Examples) -> None:
    """Check that inputs and targets of the set ``name``, each tensor ``[T, examples, ...]``, belong together.

    Raises:
        TypeError: if one is no tensor.
        ValueError: if the shapes do not match, or a set is empty.
    """
    sides = {side: named_leaves(side, value) for side, value in ((f"{name}_x", x), (f"{name}_y", y))}
    leaves = {tensor: leaf for side in sides.values() for tensor, leaf in side.items()}
    check_tensors(leaves)
    if empty := [side for side, held in sides.items() if not held]:
        raise ValueError(f"{empty[0]} holds no tensor; give at least one.")
    shapes = {tensor: tuple(leaf.shape) for tensor, leaf in leaves.items()}
    for tensor, shape in shapes.items():
        if len(shape) < 2:
            raise ValueError(f"{tensor} has shape {shape}; it must lead with [tasks, examples].")
    if len({shape[:2] for shape in shapes.values()}) > 1:
        names = " and ".join([", ".join(list(shapes)[:-1]), list(shapes)[-1]])
        raise ValueError(f"{names} must lead with the same numbers of tasks and examples, got {shapes}.")
    first = next(iter(shapes))
    if 0 in shapes[first][:2]:
        raise ValueError(f"the {name} set is empty, {first} has shape {shapes[first]}; give at least one example.")


@dataclass(frozen=True, eq=False)  # tensors have no single truth to compare by
class Episodes:
    """A batch of T few-shot tasks; every tensor leads with the task dimension.

    Each of the four may also be a tuple, list, dictionary or dataclass of such tensors, integers among them: a model of
    several arguments is called with those of a tuple, or by the names of a dictionary.

    Args:
        support_x: inputs to adapt on, ``[T, S, ...]``.
        support_y: their targets, ``[T, S]`` int64 class labels or ``[T, S, ...]`` regression targets.
        query_x: inputs that the adapted parameters are judged on, ``[T, Q, ...]``.
        query_y: their targets, ``[T, Q]`` or ``[T, Q, ...]``.

    Raises:
        TypeError: if one is no tensor.
        ValueError: if the tensors disagree on T, on S or on Q, or if there is no task or an empty set.
    """

    support_x: Examples
    support_y: Examples
    query_x: Examples
    query_y: Examples

    __repr__ = short_repr

    def __post_init__(self) -> None:
        check_examples("support", self.support_x, self.support_y)
        check_examples("query", self.query_x, self.query_y)
        shapes = {name: tuple(leaf.shape) for name, leaf in self.named_tensors().items()}
        if len({shape[0] for shape in shapes.values()}) != 1:
            raise ValueError(f"Episodes: every tensor must lead with the same number of tasks T, got {shapes}.")

    def named_tensors(self) -> dict[str, Tensor]:
        """Return every tensor, by its name in messages."""
        parts = (named_leaves(f.name, getattr(self, f.name)) for f in fields(self))
        return {name: leaf for part in parts for name, leaf in part.items()}

    @property
    def tasks(self) -> int:
        """T, the number of tasks."""
        return self._first.shape[0]

    @property
    def device(self) -> torch.device:
        """The device of the inputs."""
        return self._first.device

    @property
    def _first(self) -> Tensor:
        first: Tensor = tree_leaves(self.support_x)[0]
        return first

    def split(self, size: int) -> list[Episodes]:
        """Split into batches of at most ``size`` tasks, in order."""
        parts = [getattr(self, f.name) for f in fields(self)]
        starts = range(0, self.tasks, size)
        return [Episodes(*(tree_map(lambda leaf, t=t: leaf[t : t + size], part) for part in parts)) for t in starts]


@renamed(figures="diagnostics")
@dataclass(frozen=True, eq=False)
class MetaGradient:
    """The result of every engine.

    Args:
        loss: mean query loss over tasks, a detached scalar.
        grads: d loss / d theta, named and shaped like the parameters; zeros where the loss does not reach.
        predictions: of the adapted parameters on the query sets, detached, each tensor ``[T, Q, ...]``.
        support_loss: mean support loss over tasks before each inner step, detached, ``[K]``.
        diagnostics: scalars that the engine reports for logging, by name, detached.
        meta_grads: d loss / d meta, for the tensors beside theta that were given as ``meta``.
    """

    loss: Tensor
    grads: Params
    predictions: Examples
    support_loss: Tensor
    diagnostics: Mapping[str, Tensor] = field(default_factory=dict)
    meta_grads: Params = field(default_factory=dict)

    __repr__ = short_repr
