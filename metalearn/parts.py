"""The parts of a module that algorithms tell apart: its head, its normalisation, its context."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

_NORMS = (nn.modules.batchnorm._BatchNorm,)


@dataclass(frozen=True)
class Parts:
    """Names of parameters, as ``functionalize`` gives them.

    Args:
        head: weight and bias of the last linear layer; empty if there is none.
        norms: scale and shift of every BatchNorm.
        context: context parameters (CAVIA), those called ``context``.
        all: every trainable parameter.
    """

    head: tuple[str, ...]
    norms: frozenset[str]
    context: frozenset[str]
    all: frozenset[str]

    @property
    def body(self) -> frozenset[str]:
        """All but the head."""
        return self.all - set(self.head)


def parts_of(module: nn.Module) -> Parts:
    """The parts of a module, by the types of its layers.

    Example:
        >>> parts_of(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))).head
        ('2.weight', '2.bias')
    """
    trainable = {name for name, p in module.named_parameters() if p.requires_grad}
    linear = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    head = [_join(linear[-1], name) for name in ("weight", "bias")] if linear else []
    norms = [
        _join(name, own)
        for name, layer in module.named_modules()
        if isinstance(layer, _NORMS)
        for own in ("weight", "bias")
    ]
    return Parts(
        head=tuple(name for name in head if name in trainable),
        norms=frozenset(norms) & trainable,
        context=frozenset(name for name in trainable if name.rpartition(".")[2] == "context"),
        all=frozenset(trainable),
    )


def _join(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name
