"""Arithmetic on parameter dictionaries, and any ``nn.Module`` as a pure function of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from metalearn.core.module_checks import check_module, check_signature
from metalearn.core.types import Forward, Params, check_tensors

log = logging.getLogger(__name__)

_TOLD = WeakIdKeyDictionary()
"""Modules whose written buffers were spoken of, as keys."""


def functionalize(module: nn.Module) -> tuple[Forward, Params]:
    """Split a module into a pure function and the parameters that it is a function of.

    Trainable parameters become the dictionary; frozen ones (``requires_grad=False``) and buffers stay in the module as
    constants. The module is not changed, not even by a forward pass that writes to a buffer (``torch.vmap`` refuses
    one that writes what depends on the input), and later changes of its trainable parameters are not seen.

    A class may define, beside ``forward``, ``forward_of_tasks(params, x)``: the predictions ``[T, examples, ...]`` that
    ``torch.vmap`` of its forward pass would give for all its parameters, stacked ``[T, ...]``, and ``x``
    ``[T, examples, ...]``; and ``is_plain()``, whether its layers are still those that this stands for. It is taken
    where ``models/kernels`` are, unless a subclass overrides ``forward``, a parameter is frozen or a layer hooked.

    Args:
        module: maps one tensor ``[examples, ...]`` to predictions ``[examples, ...]``, by operations that
            ``torch.vmap`` can batch: no branch on a tensor's values, no recurrent cuDNN layers.

    Returns:
        ``(forward, params)``: ``forward(params, x)`` is the module's output for one task under ``params``;
        ``params`` are detached copies of the trainable parameters, by name.

    Raises:
        ValueError: if nothing is trainable, or naming a layer that cannot be part of a pure function: normalisation
            in training mode with running statistics, ``sparse=True``, ``max_norm=``, a gradient hook, scripted, lazy.
        TypeError: if the module does not take one tensor.

    Example:
        >>> forward, theta = functionalize(nn.Linear(3, 2))
        >>> forward(theta, torch.zeros(4, 3)).shape
        torch.Size([4, 2])
    """
    check_module(module)
    check_signature(module)
    params = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    if not params:
        raise ValueError(
            f"functionalize: {type(module).__name__} has no trainable parameter. Set requires_grad=True on what the "
            "inner loop is to adapt."
        )
    return ModuleForward(module), params


@dataclass(frozen=True, eq=False)
class ModuleForward:
    """A module as a pure function of its parameters; pickled and copied wherever the module can be.

    Args:
        module: the user's own, which every pass leaves as it was.
    """

    module: nn.Module

    def __call__(self, params: Params, x: Tensor) -> Tensor:
        """Return the module's predictions for one task under ``params``.

        Raises:
            ValueError: if ``params`` has names that the module has not, or the module has been changed to one that
                ``functionalize`` refuses.
            TypeError: if the module gives other than one tensor.
        """
        check_module(self.module)  # again, as model.train() may have been called since
        kind = type(self.module).__name__
        values = self._values(params)
        with _standing_in(self.module, values):
            prediction: Any = self.module(x)
        self._tell_of_written_buffers(values)
        if not isinstance(prediction, Tensor):
            raise TypeError(
                f"functionalize: {kind} returns {type(prediction).__name__} and must return one tensor of "
                "predictions; wrap it in a module that picks it out."
            )
        return prediction

    def _tell_of_written_buffers(self, values: Mapping[int, Tensor]) -> None:
        """Say once that a pass has written to a buffer: it wrote to a copy, and the next pass begins anew."""
        if self.module in _TOLD:
            return
        written = [
            name
            for name, b in self.module.named_buffers()
            if not values[id(b)].is_inference() and values[id(b)]._version > 0
        ]
        if written:
            _TOLD[self.module] = True
            log.warning(
                "%s writes to its buffer '%s' in a forward pass. Tasks would share it, so that every pass writes to a "
                "copy: the buffer stays as it is, and model.eval() uses it so. With spectral_norm, call model.eval() "
                "first, and go on with its power iteration in between: model.train()(x).",
                type(self.module).__name__,
                written[0],
            )

    @property
    def of_tasks(self) -> Callable[[Params, Tensor], Tensor | None] | None:
        """The predictions of all tasks at once, where the module's class defines them."""
        return self._of_tasks if {"forward", "forward_of_tasks"} <= vars(type(self.module)).keys() else None

    def _of_tasks(self, fast: Params, x: Tensor) -> Tensor | None:
        module: Any = self.module
        prediction: Tensor | None = module.forward_of_tasks(fast, x) if _is_plain(module, fast) else None
        return prediction

    def _values(self, params: Params) -> dict[int, Tensor]:
        """Return the tensor that stands in for each of the module's, by the id of that."""
        own: dict[str, Tensor] = dict(self.module.named_buffers(remove_duplicate=False))
        own |= self.module.named_parameters(remove_duplicate=False)
        if unknown := params.keys() - own.keys():
            raise ValueError(
                f"params names {', '.join(map(repr, unknown))}, which {type(self.module).__name__} has not; it has "
                f"{', '.join(sorted(own))}."
            )
        values = {id(own[name]): p for name, p in params.items()}
        if len(values) < len(params):
            raise ValueError(
                f"params has two of {', '.join(params)} that are one tensor of {type(self.module).__name__}; give it "
                "once, by the name that functionalize gives it."
            )
        return {id(b): b.clone() for b in self.module.buffers()} | values  # who writes to them writes to a copy


@contextmanager
def _standing_in(module: nn.Module, values: Mapping[int, Tensor]) -> Iterator[None]:
    """Let other tensors stand in for a module's own during a pass, and restore it then, whatever has happened.

    Each owner is seen once, and a tied tensor replaced in all its places: ``torch.func.functional_call`` does not
    restore a submodule that is reachable under two names (https://github.com/pytorch/pytorch/issues/164759).
    """
    modules = list(module.modules())
    places: list[dict[str, Any]] = [place for m in modules for place in (m._parameters, m._buffers)]
    saved, attributes = [dict(place) for place in places], [_attributes(m) for m in modules]
    constants = [p for m in modules for p in m._parameters.values() if p is not None and id(p) not in values]
    versions = [p._version for p in constants if not p.is_inference()]
    try:
        for place in places:
            for name, tensor in place.items():
                place[name] = values.get(id(tensor), tensor)
        yield
    finally:
        for m, attribute in zip(modules, attributes, strict=True):
            vars(m).update(attribute)
        for place, tensors in zip(places, saved, strict=True):
            place.clear()
            place.update(tensors)
    if [p._version for p in constants if not p.is_inference()] != versions:
        raise ValueError(
            f"{type(module).__name__} changes a frozen parameter in place, so that every later pass sees something "
            "else. Compute a new tensor, or keep it as a buffer, of which every pass changes a copy."
        )


def _attributes(m: nn.Module) -> dict[str, Any]:
    """Return what a pass must not leave changed beside tensors: all of torch's layers, as LSTMs keep weights there.

    A user's layers may hand something to the loss (``self.kl = ...``), which therefore stays.
    """
    return dict(vars(m)) if str(type(m).forward.__module__).startswith("torch.") else {"training": m.training}


def _is_plain(module: nn.Module, params: Params) -> bool:
    """Whether nothing has come between the module's definition and what it computes."""
    hooked = any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in module.modules())
    names = {name for name, _ in module.named_parameters()}
    return not hooked and params.keys() == names and bool(module.is_plain())  # type: ignore[operator]


def check_not_inference_mode() -> None:
    """Tensors made in inference mode never carry a graph, so that every gradient would look like zero.

    Raises:
        RuntimeError: inside ``torch.inference_mode()``.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "there are no gradients inside torch.inference_mode(), and adapting takes gradients; use torch.no_grad(), "
            "under which metalearn turns them on where it needs them."
        )


def check_forward(forward: object) -> None:
    """Refuse a module in the place of the function that ``functionalize`` makes of it.

    Raises:
        TypeError: saying how to make it.
    """
    if isinstance(forward, nn.Module) or not callable(forward):
        raise TypeError(
            f"forward is {type(forward).__name__} and must be a function of (params, x): forward, theta = "
            "functionalize(model) makes it of a module."
        )


def check_param_dict(params: object) -> None:
    """Refuse parameters that have no names.

    Raises:
        TypeError: naming the type.
    """
    if not isinstance(params, (Mapping, nn.ParameterDict)):
        raise TypeError(
            f"params is {type(params).__name__} and must be a dictionary of tensors, as functionalize gives."
        )


def check_params(params: Params) -> None:
    """Refuse meta-parameters that cannot be adapted.

    Raises:
        ValueError: if there is none.
        RuntimeError: inside ``torch.inference_mode()``.
        TypeError: if this is no dictionary, or naming the one that is not a floating-point tensor.
    """
    check_not_inference_mode()
    check_param_dict(params)
    if not params:
        raise ValueError("params is empty: there is nothing to adapt.")
    for name, p in params.items():
        if not isinstance(p, Tensor) or not p.is_floating_point():
            kind = p.dtype if isinstance(p, Tensor) else type(p).__name__
            remedy = (
                "Keep the parameter as torch.view_as_real(p), and compute with torch.view_as_complex of it"
                if isinstance(p, Tensor) and p.is_complex()
                else "Convert it with .float(), or keep it in the model as a buffer, which is a constant"
            )
            raise TypeError(f"params[{name!r}] is {kind}: only floating-point tensors have gradients. {remedy}.")
    check_tensors({f"params[{name!r}]": p for name, p in params.items()})


def expand_over_tasks(theta: Params, tasks: int) -> Params:
    """One copy of theta per task: ``[...]`` to ``[T, ...]``, all of which share memory; differentiable in theta.

    On CPUs convolutions' weights are laid channels last, as the kernels take them without a copy.
    """
    return {name: _laid_out(p).expand(tasks, *p.shape) for name, p in theta.items()}


def _laid_out(p: Tensor) -> Tensor:
    channels_last = p.ndim == 4 and p.device.type == "cpu"
    return p.contiguous(memory_format=torch.channels_last) if channels_last else p


def grad_of(loss: Tensor, params: Params, *, create_graph: bool) -> Params:
    """``torch.autograd.grad`` over a dictionary; zeros for the parameters that the loss does not reach.

    Raises:
        ValueError: if the loss reaches none of them, which is a mistake and not a zero gradient.
    """
    reached: tuple[Tensor | None, ...] = (None,) * len(params)
    if loss.requires_grad:
        reached = torch.autograd.grad(loss, list(params.values()), create_graph=create_graph, allow_unused=True)
    if all(g is None for g in reached):
        raise ValueError(
            f"the loss depends on no parameter of {', '.join(list(params)[:5])}{', ...' if len(params) > 5 else ''}: "
            "nothing that was computed from them reaches it through autograd. Look for .detach(), .item(), argmax or "
            "torch.no_grad() in the model or in the loss, or for what InnerLoop's adapted_params leaves out."
        )
    return {
        name: torch.zeros_like(p, requires_grad=False) if g is None else g
        for (name, p), g in zip(params.items(), reached, strict=True)
    }


def vjp(outputs: Params, inputs: Params, lam: Params, *, create_graph: bool = False) -> Params:
    """The transposed Jacobian of outputs in inputs times lam, named like the inputs; zeros where nothing is reached."""
    reached = [name for name, w in outputs.items() if w.requires_grad]
    grads = torch.autograd.grad(
        *([outputs[n] for n in reached], list(inputs.values()), [lam[n] for n in reached]),
        create_graph=create_graph,
        materialize_grads=True,
    )
    return dict(zip(inputs, grads, strict=True))


def global_norm(tree: Params) -> Tensor:
    """Euclidean norm over every entry of every tensor."""
    norm: Tensor = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(p) for p in tree.values()]))
    return norm


def relative_error(got: Params, expected: Params) -> float:
    """|got - expected| / |expected| of the whole dictionary as one vector, in float64; NaN where either is."""
    difference = {name: got[name].double() - g.double() for name, g in expected.items()}
    return (global_norm(difference) / global_norm(expected).double()).item()
