"""Turn any ``nn.Module`` into a pure function of its parameters."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from metalearn.core.deprecation import adopt_former_methods
from metalearn.core.module_checks import (
    RUNNING_STATISTICS,
    BatchNormMode,
    check_arguments,
    check_module,
    module_arguments,
)
from metalearn.core.short_repr import short_repr
from metalearn.core.threads import one_thread_at_a_time
from metalearn.core.types import Examples, Forward, Params, named_leaves

log = logging.getLogger(__name__)

_WARNED = WeakIdKeyDictionary()
"""Modules whose buffer writes were logged, as keys."""

_ASSIGNED = WeakIdKeyDictionary()
"""Of each layer, what the last pass assigned: name, earlier attribute (none or one), and the tensor, or one in it."""


@one_thread_at_a_time()
def functionalize(module: nn.Module, *, batch_norm: BatchNormMode | None = None) -> tuple[Forward, Params]:
    """Split a module into a pure function and its trainable parameters.

    Trainable parameters become the dictionary; frozen ones (``requires_grad=False``) and buffers stay in the module as
    constants. The module is not changed, not even by a forward pass that writes to a buffer (``torch.vmap`` refuses
    one that writes what depends on the input), and later changes of its trainable parameters are not seen.

    Besides ``forward`` a class may define ``batched_forward(params, x)``: for stacked parameters ``[T, ...]`` and ``x``
    ``[T, examples, ...]`` it returns the predictions ``[T, examples, ...]`` that ``torch.vmap`` of ``forward`` would
    give; and ``supports_batched_forward()``: whether the layers are still those that it was written for. It is used
    where ``models/kernels`` are, unless a subclass overrides ``forward``, a parameter is frozen or a layer has a hook.

    Args:
        module: maps examples, each tensor ``[examples, ...]``, to predictions ``[examples, ...]``, by operations that
            ``torch.vmap`` can batch: no branch on a tensor's values. Examples in a tuple are its arguments, those in a
            dictionary its arguments by name.
        batch_norm: for a model with running statistics, as pretrained ones have, in training mode and in ``eval()``
            alike: ``"task"`` normalises by the mean and variance of the examples that pass, support or query set of one
            task; ``"frozen"`` by the stored ones, as constants. ``None`` refuses such a model, unless in ``eval()``.

    Returns:
        ``(forward, params)``: ``forward(params, x)`` is the module's output for one task under ``params``;
        ``params`` are detached copies of the trainable parameters, by name.

    Raises:
        ValueError: if nothing is trainable, or naming a layer that cannot be part of a pure function: normalisation
            in training mode with running statistics, ``sparse=True``, ``max_norm=``, a gradient hook, scripted, lazy.
        TypeError: when it is called, if the module does not take what the examples hold.

    Examples:
        >>> forward, theta = functionalize(nn.Linear(3, 2))
        >>> forward(theta, torch.zeros(4, 3)).shape
        torch.Size([4, 2])
    """
    if not isinstance(module, nn.Module):
        kind = f"the class {module.__name__}" if isinstance(module, type) else type(module).__name__
        raise TypeError(f"functionalize: this is {kind}, and must be an nn.Module; a function is a forward already.")
    if batch_norm not in (None, *get_args(BatchNormMode)):
        raise ValueError(f"functionalize: batch_norm={batch_norm!r}; it must be 'task', 'frozen' or None.")
    check_module(module, batch_norm)
    defined = vars(type(module))
    if "forward_of_tasks" in defined and "batched_forward" not in defined:
        adopt_former_methods(
            type(module), {"forward_of_tasks": "batched_forward", "is_plain": "supports_batched_forward"}
        )
    params = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    if not params:
        raise ValueError(
            f"functionalize: {type(module).__name__} has no trainable parameter. Set requires_grad=True on the "
            "parameters to adapt."
        )
    return ModuleForward(module, batch_norm), params


@dataclass(frozen=True, eq=False)
class ModuleForward:
    """A module, which no pass changes, as a pure function; can be pickled and copied if the module can."""

    module: nn.Module
    batch_norm: BatchNormMode | None = None

    __repr__ = short_repr

    @property
    def signature_of(self) -> Callable[..., Any]:
        """The function whose arguments are the module's."""
        return type(self.module).forward

    @one_thread_at_a_time()
    def __call__(self, params: Params, x: Examples, **more: Tensor) -> Any:
        """Return the module's predictions for one task under ``params``; a parameter that they lack keeps its value.

        A tuple of examples becomes the module's arguments, a dictionary its arguments by name, as ``more`` does.

        Raises:
            ValueError: if ``params`` has names that the module lacks, or the module was changed to one that
                ``functionalize`` does not accept.
            TypeError: if the module does not take these arguments, or returns anything but tensors.
        """
        check_module(self.module, self.batch_norm)  # again, as model.train() may have been called since
        args, kwargs = module_arguments(x)
        kind = type(self.module).__name__
        if clash := kwargs.keys() & more.keys():
            raise ValueError(
                f"functionalize: {sorted(clash)} are both examples and meta-learned tensors; give these another name."
            )
        kwargs |= more
        values = self._replacements(params)
        with _replace_tensors(self.module, values, self.batch_norm):
            try:
                prediction = self.module(*args, **kwargs)
            except TypeError:
                check_arguments(self.module, args, kwargs)  # says more, where they are at fault
                raise
        self._warn_about_buffer_writes(values)
        for name, leaf in named_leaves("its prediction", prediction).items():
            if not isinstance(leaf, Tensor):
                raise TypeError(
                    f"functionalize: {kind} returns {type(leaf).__name__} as {name}, and must return a tensor, or a "
                    "tuple or dictionary of tensors; wrap it in a module that selects them."
                )
        return prediction

    def _warn_about_buffer_writes(self, values: Mapping[int, Tensor]) -> None:
        """Warn once if a pass has written to a buffer: it wrote to a copy, which the next pass does not see."""
        if self.module in _WARNED:
            return
        written = [
            name
            for name, b in self.module.named_buffers()
            if not values[id(b)].is_inference() and values[id(b)]._version > 0
        ]
        if written:
            _WARNED[self.module] = True
            log.warning(
                "%s writes to its buffer '%s' in a forward pass. As tasks would share it, every pass writes to a copy: "
                "the buffer keeps its value, which model.eval() uses. With spectral_norm, call model.eval() first, and "
                "continue its power iteration in between: model.train()(x).",
                type(self.module).__name__,
                written[0],
            )

    @property
    def batched_forward(self) -> Callable[[Params, Tensor], Tensor | None] | None:
        """Predictions of all tasks at once, if the module's class defines them; ``None`` where they do not apply."""
        defined = vars(type(self.module))
        return self._batched_forward if {"batched_forward", "forward"} <= defined.keys() else None

    def _batched_forward(self, fast: Params, x: Tensor) -> Tensor | None:
        module: Any = self.module
        hooked = any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in module.modules())
        applies = not hooked and fast.keys() == dict(module.named_parameters()).keys()
        return module.batched_forward(fast, x) if applies and module.supports_batched_forward() else None

    def _replacements(self, params: Params) -> dict[int, Tensor]:
        """Return the tensor that replaces each of the module's tensors during a pass, by the id of the latter."""
        tensors: dict[str, Tensor] = dict(self.module.named_buffers(remove_duplicate=False))
        tensors |= self.module.named_parameters(remove_duplicate=False)
        if unknown := params.keys() - tensors.keys():
            raise ValueError(
                f"params names {', '.join(map(repr, unknown))}, which {type(self.module).__name__} does not have; it "
                f"has {', '.join(sorted(tensors))}."
            )
        values = {id(tensors[name]): p for name, p in params.items()}
        if len(values) < len(params):
            raise ValueError(
                f"params has two of {', '.join(params)} that are one tensor of {type(self.module).__name__}; give it "
                "once, by the name that functionalize gives it."
            )
        return {id(b): b.clone() for b in self.module.buffers()} | values  # a pass that writes to one writes to a copy


@contextmanager
def _replace_tensors(
    module: nn.Module, values: Mapping[int, Tensor], batch_norm: BatchNormMode | None
) -> Iterator[None]:
    """Replace a module's tensors, in all places of each, during a pass, and restore it afterwards, even after an error.

    ``torch.func.functional_call`` does not restore a submodule that is reachable under two names
    (https://github.com/pytorch/pytorch/issues/164759).
    """
    modules = list(module.modules())
    for m in modules:
        _restore_assigned(m)
    before = [dict(vars(m)) for m in modules]
    places: list[dict[str, Any]] = [place for m in modules for place in (m._parameters, m._buffers)]
    saved = [dict(place) for place in places]
    constants = [p for m in modules for p in m._parameters.values() if p is not None and id(p) not in values]
    versions = [p._version for p in constants if not p.is_inference()]
    try:
        for place in places:
            for name, tensor in place.items():
                place[name] = values.get(id(tensor), tensor)
        if batch_norm is not None:
            for m in modules:
                if isinstance(m, RUNNING_STATISTICS):
                    _set_statistics(m, batch_norm)
        yield
    finally:
        for m, earlier in zip(modules, before, strict=True):
            vars(m).update(_attributes_to_restore(m, earlier))
        for place, tensors in zip(places, saved, strict=True):
            place.clear()
            place.update(tensors)
        for m, earlier in zip(modules, before, strict=True):
            if assigned := [
                (name, {n: v for n, v in earlier.items() if n == name}, weakref.ref(tensor))
                for name, value in vars(m).items()
                if value is not earlier.get(name) and (tensor := _first_tensor(value)) is not None
            ]:
                _ASSIGNED[m] = assigned
    if [p._version for p in constants if not p.is_inference()] != versions:
        raise ValueError(
            f"{type(module).__name__} changes a frozen parameter in place, so that every later pass sees something "
            "else. Compute a new tensor, or keep it as a buffer, of which every pass changes a copy."
        )


def _restore_assigned(layer: nn.Module) -> None:
    """Take back what the last pass assigned, which a loss may have read: another pass must not take it for its own."""
    for name, earlier, tensor in _ASSIGNED.pop(layer, ()):
        if (left := _first_tensor(vars(layer).get(name))) is not None and left is tensor():
            vars(layer).pop(name)
            vars(layer).update(earlier)


def _first_tensor(value: Any) -> Tensor | None:
    return next((leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)), None)


def _set_statistics(layer: Any, batch_norm: BatchNormMode) -> None:
    """Let a normalisation take the statistics of what passes, or the stored ones, and write none."""
    if batch_norm == "frozen":
        layer.training = False
    else:
        layer.track_running_stats = False
        layer._buffers.update(running_mean=None, running_var=None)


def _attributes_to_restore(m: nn.Module, earlier: dict[str, Any]) -> dict[str, Any]:
    """Return what torch's own layers had before (LSTMs keep weights there); a user's may hand some to the loss."""
    if isinstance(m, nn.RNNBase) or str(type(m).forward.__module__).startswith("torch."):
        return earlier
    return {name: earlier[name] for name in ("training", "track_running_stats") if name in earlier}


def check_forward(forward: object) -> None:
    """Raise ``TypeError`` if ``forward`` is a module, or no function."""
    if isinstance(forward, nn.Module) or not callable(forward):
        raise TypeError(
            f"forward is {type(forward).__name__} and must be a function of (params, x): forward, theta = "
            "functionalize(model) makes it of a module."
        )
