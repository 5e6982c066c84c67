"""Short reprs of dataclasses and named tuples that hold tensors: shapes in place of numbers, and no defaults."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def short_repr(self: Any, **more: object) -> str:
    """Return ``Name(field=value, ...)`` without fields at their defaults; ``more`` values follow.

    A tensor is its dtype and shape, a single number also its value; the device is named once. A class takes it by
    ``__repr__ = short_repr``.

    Examples:
        >>> print(short_repr(Episodes(*[torch.zeros(2, 5)] * 4)))
        Episodes(support_x=float32[2, 5], support_y=float32[2, 5], query_x=float32[2, 5], query_y=float32[2, 5], on cpu)
    """
    values = [*_changed_fields(self), *more.items()]
    parts = [f"{name}={_SHORT.repr(value)}" for name, value in values]
    devices = dict.fromkeys(str(t.device) for _, value in values for t in _tensors_in(value))
    where = [f"on {' and '.join(devices)}"] if devices else []
    return f"{type(self).__name__}({', '.join(parts + where)})"


def _changed_fields(item: Any) -> Iterator[tuple[str, Any]]:
    """Yield the fields that a repr shows and that differ from their defaults."""
    if not dataclasses.is_dataclass(item):
        yield from item._asdict().items()
        return
    for field in dataclasses.fields(item):
        value = getattr(item, field.name)
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        if field.repr and not (type(value) is type(default) and value == default):
            yield field.name, value


def _tensors_in(value: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


class _ShortRepr(reprlib.Repr):
    """The standard library's shortened reprs, extended to tensors, modules and functions."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 48
        self.maxlist = self.maxset = self.maxfrozenset = self.maxdict = 3

    def repr1(self, x: Any, level: int) -> str:
        """Return the repr of one value."""
        if isinstance(x, Tensor):
            return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}{_value(x)}"
        if isinstance(x, nn.Module):
            return f"{type(x).__name__}(...)"
        if isinstance(x, torch.device):
            return str(x)
        if dataclasses.is_dataclass(type(x)) or (isinstance(x, tuple) and getattr(type(x), "_fields", None)):
            return short_repr(x)
        return super().repr1(x, level)

    def repr_function(self, x: Any, level: int) -> str:
        """Return a function's name, without its address."""
        return str(x.__qualname__)


def _value(x: Tensor) -> str:
    """Return the value of a single number, where it has one: not so on the meta device, or within ``torch.vmap``."""
    if x.ndim or x.is_meta or x.is_complex():
        return ""
    try:
        return f"={x.item():.4g}" if x.is_floating_point() else f"={x.item()}"
    except RuntimeError:
        return ""


_SHORT = _ShortRepr()
