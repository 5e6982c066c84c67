"""The parts of a module that algorithms tell apart: its head, its normalisation, its context."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

_HEADS = ("head", "fc", "classifier")
_NORMS = (nn.modules.batchnorm._BatchNorm,)


@dataclass(frozen=True)
class Parts:
    """Names of parameters, as ``functionalize`` gives them.

    Args:
        head: weight and bias of the linear layer that gives the outputs; empty if there is none.
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


def parts_of(module: nn.Module, *, head: str | None = None) -> Parts:
    """The parts of a module, by the types of its layers.

    Args:
        module: any.
        head: name of its head; ``None`` takes the linear layer called ``head``, ``fc`` or ``classifier``, and where
            there is none the linear layer that was declared last.

    Raises:
        ValueError: if the module has no linear layer of the name that is given.

    Example:
        >>> parts_of(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))).head
        ('2.weight', '2.bias')
    """
    trainable = {name for name, p in module.named_parameters() if p.requires_grad}
    linear = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    if head is not None and head not in linear:
        raise ValueError(f"head={head!r} is no nn.Linear of the module; it has {', '.join(linear) or 'none'}.")
    called = [name for name in linear if name.rpartition(".")[2] in _HEADS]
    head = head if head is not None else [None, *linear, *called][-1]
    of_head = [] if head is None else [_join(head, name) for name in ("weight", "bias")]
    norms = [
        _join(name, own)
        for name, layer in module.named_modules()
        if isinstance(layer, _NORMS)
        for own in ("weight", "bias")
    ]
    return Parts(
        head=tuple(name for name in of_head if name in trainable),
        norms=frozenset(norms) & trainable,
        context=frozenset(name for name in trainable if name.rpartition(".")[2] == "context"),
        all=frozenset(trainable),
    )


def _join(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name
