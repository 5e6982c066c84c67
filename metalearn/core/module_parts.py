"""Find the parts of a module that algorithms treat differently: its head, its normalisation, its context."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from metalearn.core.deprecation import renamed

_HEAD_NAMES = ("head", "heads", "fc", "classifier")
_MAX_LISTED = 10


@renamed(norms="norm_params", context="context_params", all="all_params")
@dataclass(frozen=True)
class ModuleParts:
    """Names of parameters by role, as ``functionalize`` names them: a shared one has the name in its first layer.

    Args:
        head: weight and bias of the linear layer that gives the outputs; empty if there is none.
        norm_params: scale and shift of every BatchNorm.
        context_params: context parameters (CAVIA), those called ``context``.
        all_params: every trainable parameter.
        tied: those that several layers share.
    """

    head: tuple[str, ...]
    norm_params: frozenset[str]
    context_params: frozenset[str]
    all_params: frozenset[str]
    tied: frozenset[str] = frozenset()

    @property
    def body(self) -> frozenset[str]:
        """All parameters but the head's."""
        return self.all_params - set(self.head)


def module_parts(module: nn.Module, *, head: str | None = None) -> ModuleParts:
    """Find the head, the normalisation and the context parameters of a module by the types of its layers.

    Args:
        module: any module.
        head: name of its head; ``None`` takes the last linear layer in the child called ``head``, ``heads``, ``fc`` or
            ``classifier`` (``fc``, ``classifier.6``; not ``block.fc``), or without one the linear layer declared last.

    Raises:
        ValueError: if the module has no linear layer called ``head``, or if ``head`` is ``None`` and ambiguous.

    Examples:
        >>> module_parts(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))).head
        ('2.weight', '2.bias')
    """
    names = {id(p): name for name, p in module.named_parameters() if p.requires_grad}
    places = Counter(id(p) for layer in module.modules() for p in layer._parameters.values())

    def named(layers: Iterable[nn.Module]) -> tuple[str, ...]:
        return tuple(names[id(p)] for layer in layers for p in layer._parameters.values() if id(p) in names)

    layer = _find_head(module, head)
    return ModuleParts(
        head=() if layer is None else named(layer.modules()),
        norm_params=frozenset(named(m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))),
        context_params=frozenset(name for name in names.values() if name.rpartition(".")[2] == "context"),
        all_params=frozenset(names.values()),
        tied=frozenset(name for p, name in names.items() if places[p] > 1),
    )


def _find_head(module: nn.Module, head: str | None) -> nn.Linear | None:
    """Return the layer that gives the outputs: the one called ``head``, or by its usual name, or the last one."""
    linear = {n: m for n, m in module.named_modules(remove_duplicate=head is None) if isinstance(m, nn.Linear)}
    if head is not None:
        if head not in linear:
            raise ValueError(f"head={head!r} is no nn.Linear of the module; it has {', '.join(linear) or 'none'}.")
        return linear[head]
    candidates = list(linear.values())
    if called := [child for name, child in _unwrap(module).named_children() if name in _HEAD_NAMES]:
        candidates = [m for m in called[-1].modules() if isinstance(m, nn.Linear)]
    if candidates and _may_feed_earlier_layer(candidates):
        listed = [f"{name} ({m.in_features} to {m.out_features})" for name, m in linear.items()]
        more = f" and {len(listed) - _MAX_LISTED} more" if len(listed) > _MAX_LISTED else ""
        raise ValueError(
            f"module_parts: which linear layer of {type(module).__name__} is its head? The last may feed an earlier "
            f"one. Name it by module_parts(module, head=...), out of {', '.join(listed[:_MAX_LISTED])}{more}."
        )
    return candidates[-1] if candidates else None


def _unwrap(module: nn.Module) -> nn.Module:
    """Return the module inside of wrappers that have no other child (``DistributedDataParallel``, a user's own)."""
    children = list(module.children())
    return _unwrap(children[0]) if len(children) == 1 and list(children[0].children()) else module


def _may_feed_earlier_layer(linear: list[nn.Linear]) -> bool:
    """Return whether the last layer's outputs fit an earlier layer, if the layers do not form a chain as declared."""
    is_chain = all(before.out_features == after.in_features for before, after in pairwise(linear))
    return not is_chain and any(m.in_features == linear[-1].out_features for m in linear[:-1])
