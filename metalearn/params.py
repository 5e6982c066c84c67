"""Arithmetic on parameter dictionaries, and any ``nn.Module`` as a pure function of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from metalearn.types import Forward, Params, check_tensors

_RUNNING_STATISTICS = (nn.modules.batchnorm._NormBase,)  # BatchNorm1d..3d, SyncBatchNorm, InstanceNorm1d..3d


def functionalize(module: nn.Module) -> tuple[Forward, Params]:
    """Split a module into a pure function and the parameters that it is a function of.

    Trainable parameters become the dictionary; frozen ones (``requires_grad=False``) and buffers stay in the module as
    constants. The module is not changed, not even by a forward pass that writes to a buffer (``torch.vmap`` refuses
    one that writes what depends on the input), and later changes of its trainable parameters are not seen.

    A class may define, beside ``forward``, ``forward_of_tasks(params, x)``: the predictions ``[T, examples, ...]`` that
    ``torch.vmap`` of its forward pass would give for all its parameters, stacked ``[T, ...]``, and ``x``
    ``[T, examples, ...]``; and ``is_plain()``, whether its layers are still those that this stands for. It is taken
    where ``metalearn.kernels`` are, unless a subclass overrides ``forward``, a parameter is frozen or a layer hooked.

    Args:
        module: maps one tensor ``[examples, ...]`` to predictions ``[examples, ...]``, by operations that
            ``torch.vmap`` can batch: no branch on a tensor's values, no recurrent cuDNN layers.

    Returns:
        ``(forward, params)``: ``forward(params, x)`` is the module's output for one task under ``params``;
        ``params`` are detached copies of the trainable parameters, by name.

    Raises:
        ValueError: if nothing is trainable, or if a normalisation layer in training mode keeps running statistics:
            those are written in place, across tasks.

    Example:
        >>> forward, theta = functionalize(nn.Linear(3, 2))
        >>> forward(theta, torch.zeros(4, 3)).shape
        torch.Size([4, 2])
    """
    _refuse_running_statistics(module)
    params = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    if not params:
        raise ValueError(
            f"functionalize: {type(module).__name__} has no trainable parameter. Set requires_grad=True on what the "
            "inner loop is to adapt."
        )

    known = {
        name for named in (module.named_parameters, module.named_buffers) for name, _ in named(remove_duplicate=False)
    }

    def forward(params: Params, x: Tensor) -> Tensor:
        if unknown := params.keys() - known:
            raise ValueError(
                f"params names {', '.join(map(repr, unknown))}, which {type(module).__name__} has not; it has "
                f"{', '.join(sorted(known))}."
            )
        constants = {name: b.clone() for name, b in module.named_buffers()}  # who writes to them writes to a copy
        prediction: Any = torch.func.functional_call(module, {**constants, **params}, (x,))
        if not isinstance(prediction, Tensor):
            raise TypeError(
                f"functionalize: {type(module).__name__} returns {type(prediction).__name__} and must return one "
                "tensor of predictions; wrap it in a module that picks it out."
            )
        return prediction

    def of_tasks(fast: Params, x: Tensor) -> Tensor | None:
        prediction: Tensor | None = module.forward_of_tasks(fast, x) if _is_plain(module, fast) else None  # type: ignore[operator]
        return prediction

    if {"forward", "forward_of_tasks"} <= vars(type(module)).keys():
        forward.of_tasks = of_tasks  # type: ignore[attr-defined]
    return forward, params


def _is_plain(module: nn.Module, params: Params) -> bool:
    """Whether nothing has come between the module's definition and what it computes."""
    hooked = any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in module.modules())
    names = {name for name, _ in module.named_parameters()}
    return not hooked and params.keys() == names and bool(module.is_plain())  # type: ignore[operator]


def _refuse_running_statistics(module: nn.Module) -> None:
    for name, layer in module.named_modules():
        if isinstance(layer, _RUNNING_STATISTICS) and layer.training and layer.running_mean is not None:
            kind = type(layer).__name__
            raise ValueError(
                f"functionalize: layer '{name}' ({kind}) keeps running statistics, which every task would overwrite "
                f"in place. Build it as {kind}({layer.num_features}, track_running_stats=False), convert the model "
                "with torch.func.replace_all_batch_norm_modules_(model), or call model.eval() to use the stored "
                "statistics as constants."
            )


def refuse_inference_mode() -> None:
    """Tensors made in inference mode never carry a graph, so that every gradient would look like zero.

    Raises:
        RuntimeError: inside ``torch.inference_mode()``.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "there are no gradients inside torch.inference_mode(), and adapting takes gradients; use torch.no_grad(), "
            "under which metalearn turns them on where it needs them."
        )


def check_dictionary(params: object) -> None:
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
    refuse_inference_mode()
    check_dictionary(params)
    if not params:
        raise ValueError("params is empty: there is nothing to adapt.")
    for name, p in params.items():
        if not isinstance(p, Tensor) or not p.is_floating_point():
            kind = p.dtype if isinstance(p, Tensor) else type(p).__name__
            raise TypeError(
                f"params[{name!r}] is {kind}: only floating-point tensors have gradients. Convert it with .float(), or "
                "keep it in the model as a buffer, which is a constant."
            )
    check_tensors({f"params[{name!r}]": p for name, p in params.items()})


def stack(theta: Params, tasks: int) -> Params:
    """One copy of theta per task: ``[...]`` to ``[T, ...]``, all of which share memory; differentiable in theta.

    On CPUs convolutions' weights are laid channels last, as the kernels take them without a copy.
    """
    return {name: _laid_out(p).expand(tasks, *p.shape) for name, p in theta.items()}


def _laid_out(p: Tensor) -> Tensor:
    channels_last = p.ndim == 4 and p.device.type == "cpu"
    return p.contiguous(memory_format=torch.channels_last) if channels_last else p


def gradients(loss: Tensor, params: Params, *, create_graph: bool) -> Params:
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
            "torch.no_grad() in the model or in the loss, or for what InnerLoop's adapted leaves out."
        )
    return {
        name: torch.zeros_like(p, requires_grad=False) if g is None else g
        for (name, p), g in zip(params.items(), reached, strict=True)
    }


def pull_back(outputs: Params, inputs: Params, lam: Params, *, create_graph: bool = False) -> Params:
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
