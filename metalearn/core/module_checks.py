"""Check that a module can be a pure function of its parameters; every message names the remedy."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

RUNNING_STATISTICS = (nn.modules.batchnorm._NormBase,)  # BatchNorm1d..3d, SyncBatchNorm, InstanceNorm1d..3d
BatchNormMode = Literal["task", "frozen"]
_HOOK_ERROR = (
    "has a gradient hook, which is never called, as gradients are taken of tensors that replace the module's. "
    "Remove it (the handle's .remove()), and inspect the gradients that metalearn returns."
)


def check_module(module: nn.Module, batch_norm: BatchNormMode | None = None) -> None:
    """Raise ``ValueError``, naming the layer and the remedy, if a module cannot be a pure function of parameters."""
    for name, layer in module.named_modules():
        if error := _layer_error(layer, batch_norm):
            place = f"layer '{name}'" if name else "the module"
            raise ValueError(f"functionalize: {place} ({type(layer).__name__}) {error}")
        for p_name, p in layer._parameters.items():
            if p is not None and (error := _parameter_error(p)):
                raise ValueError(f"functionalize: parameter '{f'{name}.{p_name}' if name else p_name}' {error}")


def module_arguments(x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments that examples are for a module: those of a tuple by place, of a dictionary by name."""
    if isinstance(x, tuple) and not hasattr(x, "_fields"):
        return x, {}
    return ((), dict(x)) if isinstance(x, Mapping) else ((x,), {})


def check_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise ``TypeError`` unless a module takes these arguments."""
    if module._forward_pre_hooks or (signature := _signature(module.forward)) is None:  # hooks may add arguments
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        given = f"a dictionary of {', '.join(map(repr, kwargs))}" if kwargs else "x" if len(args) == 1 else "a tuple"
        raise TypeError(
            f"functionalize: {type(module).__name__}.forward{signature} is given {given} ({error}). Let the examples x "
            "be a tuple of its arguments, or a dictionary of them by name."
        ) from None


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):  # of a builtin function
        return None


def _layer_error(layer: nn.Module, batch_norm: BatchNormMode | None) -> str | None:
    """Return why a layer cannot be part of a pure function."""
    if isinstance(layer, RUNNING_STATISTICS):
        if layer.running_mean is None:
            if batch_norm == "frozen" and isinstance(layer, nn.modules.batchnorm._BatchNorm):
                return "keeps no statistics that could be frozen. Take batch_norm='task'."
        elif layer.training and batch_norm is None:
            return (
                "keeps running statistics, which every task would overwrite in place. Say which to take: "
                "functionalize(model, batch_norm='task'), those of a task's own examples, or batch_norm='frozen', the "
                "stored ones of a pretrained model, as constants."
            )
    if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
        if layer.max_norm is not None:
            return f"shortens its weight in place (max_norm={layer.max_norm}). Build it without max_norm."
        if isinstance(layer, nn.EmbeddingBag) and layer.sparse and layer.weight.requires_grad:
            return "gives sparse gradients (sparse=True), which have no second derivative. Build it with sparse=False."
    if isinstance(layer, torch.jit.ScriptModule):
        return "is scripted or traced, and keeps its own parameters. Pass the module itself, before it is scripted."
    if isinstance(layer, nn.DataParallel):
        return "splits its batch between devices. Pass model.module, unwrapped: tasks are batched here already."
    if type(layer).__module__.startswith("torch.ao.nn.quantized"):
        return "is quantised and has no gradient. Pass the module itself, before it is quantised."
    if layer._backward_hooks or layer._backward_pre_hooks:
        return _HOOK_ERROR
    return None


def _parameter_error(p: Tensor) -> str | None:
    if is_lazy(p):
        return "has no shape yet. Run one batch through the module first: model(x)."
    if p._backward_hooks or p._post_accumulate_grad_hooks:
        return _HOOK_ERROR
    return None
