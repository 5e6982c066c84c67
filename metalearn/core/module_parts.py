"""The parts of a module that algorithms tell apart: its head, its normalisation, its context."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

_HEADS = ("head", "heads", "fc", "classifier")
_NORMS = (nn.modules.batchnorm._BatchNorm,)
_MOST_LAYERS = 10  # that a message lists


@dataclass(frozen=True)
class ModuleParts:
    """Names of parameters, as ``functionalize`` gives them: one that several layers share has the first one's.

    Args:
        head: weight and bias of the linear layer that gives the outputs; empty if there is none.
        norms: scale and shift of every BatchNorm.
        context: context parameters (CAVIA), those called ``context``.
        all: every trainable parameter.
        tied: those that several layers share.
    """

    head: tuple[str, ...]
    norms: frozenset[str]
    context: frozenset[str]
    all: frozenset[str]
    tied: frozenset[str] = frozenset()

    @property
    def body(self) -> frozenset[str]:
        """All but the head."""
        return self.all - set(self.head)


def module_parts(module: nn.Module, *, head: str | None = None) -> ModuleParts:
    """Return the parts of a module, by the types of its layers.

    Args:
        module: any.
        head: name of its head; ``None`` takes the last linear layer in what the module itself calls ``head``,
            ``heads``, ``fc`` or ``classifier`` (``fc``, ``classifier.6``; not ``block.fc``), and where nothing is
            called so the linear layer that was declared last.

    Raises:
        ValueError: if the module has no linear layer of the name that is given; if none is given and another layer may
            be the head as well.

    Example:
        >>> parts_of(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))).head
        ('2.weight', '2.bias')
    """
    names = {id(p): name for name, p in module.named_parameters() if p.requires_grad}
    places = Counter(id(p) for layer in module.modules() for p in layer._parameters.values())

    def named(layers: Iterable[nn.Module]) -> tuple[str, ...]:
        return tuple(names[id(p)] for layer in layers for p in layer._parameters.values() if id(p) in names)

    found = _head_of(module) if head is None else _layer_called(head, module)
    return ModuleParts(
        head=() if found is None else named(found.modules()),
        norms=frozenset(named(layer for layer in module.modules() if isinstance(layer, _NORMS))),
        context=frozenset(name for name in names.values() if name.rpartition(".")[2] == "context"),
        all=frozenset(names.values()),
        tied=frozenset(name for p, name in names.items() if places[p] > 1),
    )


def _layer_called(head: str, module: nn.Module) -> nn.Linear:
    """Return the linear layer of that name, which may be any of several that it has."""
    linear = {n: m for n, m in module.named_modules(remove_duplicate=False) if isinstance(m, nn.Linear)}
    if head not in linear:
        raise ValueError(f"head={head!r} is no nn.Linear of the module; it has {', '.join(linear) or 'none'}.")
    return linear[head]


def _head_of(module: nn.Module) -> nn.Linear | None:
    """Return the layer that gives the outputs, by its name or else by its place.

    Raises:
        ValueError: if another layer may be meant.
    """
    linear = {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear)}
    called = [child for name, child in _unwrapped(module).named_children() if name in _HEADS]
    inside = list(linear.values())
    if called:
        inside = [m for m in called[-1].modules() if isinstance(m, nn.Linear)]
    if inside and _may_feed_another(inside):
        listed = [f"{name} ({m.in_features} to {m.out_features})" for name, m in linear.items()]
        more = f" and {len(listed) - _MOST_LAYERS} more" if len(listed) > _MOST_LAYERS else ""
        raise ValueError(
            f"parts_of: which linear layer of {type(module).__name__} is its head? The last one may feed one before "
            f"it. Name it by parts_of(module, head=...), out of {', '.join(listed[:_MOST_LAYERS])}{more}."
        )
    return inside[-1] if inside else None


def _unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside of wrappers, which have nothing but that (``DistributedDataParallel``, a user's own)."""
    children = list(module.children())
    return _unwrapped(children[0]) if len(children) == 1 and list(children[0].children()) else module


def _may_feed_another(linear: list[nn.Linear]) -> bool:
    """Whether the last layer's outputs fit into one before it, where the layers do not fit together as declared."""
    is_chain = all(before.out_features == after.in_features for before, after in pairwise(linear))
    return not is_chain and any(m.in_features == linear[-1].out_features for m in linear[:-1])
