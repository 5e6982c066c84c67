"""Dictionaries of parameters: checks, copies for every task, gradients, norms, finiteness."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from metalearn.core.errors import NonFiniteGradientError
from metalearn.core.types import Params, check_tensors


def check_not_inference_mode() -> None:
    """Raise ``RuntimeError`` in inference mode, where every gradient would look like zero."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "there are no gradients inside torch.inference_mode(), and adapting takes gradients; use torch.no_grad(), "
            "under which metalearn turns them on where it needs them."
        )


def check_param_dict(params: object, name: str = "params") -> None:
    """Raise ``TypeError`` unless parameters are a dictionary."""
    if not isinstance(params, (Mapping, nn.ParameterDict)):
        raise TypeError(
            f"{name} is {type(params).__name__} and must be a dictionary of tensors, as functionalize gives."
        )


def check_params(params: Params, *, name: str = "params") -> None:
    """Check that meta-parameters, called ``name`` in messages, can be adapted.

    Raises:
        ValueError: if there is none, or naming one that was made inside ``torch.inference_mode()``.
        RuntimeError: inside ``torch.inference_mode()``.
        TypeError: if this is no dictionary, or naming the one that is not a dense floating-point tensor.
    """
    check_not_inference_mode()
    check_param_dict(params, name)
    if not params:
        raise ValueError(f"{name} is empty: there is nothing to adapt.")
    for key, p in params.items():
        if not isinstance(p, Tensor) or not p.is_floating_point():
            kind = p.dtype if isinstance(p, Tensor) else type(p).__name__
            remedy = (
                "Keep the parameter as torch.view_as_real(p), and compute with torch.view_as_complex of it"
                if isinstance(p, Tensor) and p.is_complex()
                else "Convert it with .float(), or keep it in the model as a buffer, which is a constant"
            )
            raise TypeError(f"{name}[{key!r}] is {kind}: only floating-point tensors have gradients. {remedy}.")
        if p.is_inference():
            raise ValueError(
                f"{name}[{key!r}] was made inside torch.inference_mode() and can have no gradient; give p.clone(), "
                "or make it under torch.no_grad()."
            )
    check_tensors({f"{name}[{key!r}]": p for key, p in params.items()})


def expand_over_tasks(theta: Params, tasks: int) -> Params:
    """Return one copy of theta per task, ``[...]`` to ``[T, ...]``, in shared memory; differentiable in theta."""
    fast: Params = {}
    for name, p in theta.items():
        on_cpu = p.ndim == 4 and p.device.type == "cpu"  # channels last, which the CPU kernels read without a copy
        w = p.contiguous(memory_format=torch.channels_last) if on_cpu else p
        fast[name] = w.expand(tasks, *p.shape)
    return fast


def grad_of(loss: Tensor, params: Params, *, create_graph: bool) -> Params:
    """Call ``torch.autograd.grad`` on a dictionary; zeros for parameters that the loss does not reach.

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
    """Return the vector-Jacobian product of outputs with lam, named like the inputs; zeros where nothing is reached."""
    reached = [name for name, w in outputs.items() if w.requires_grad]
    grads = torch.autograd.grad(
        *([outputs[n] for n in reached], list(inputs.values()), [lam[n] for n in reached]),
        create_graph=create_graph,
        materialize_grads=True,
    )
    return dict(zip(inputs, grads, strict=True))


def global_norm(tree: Params) -> Tensor:
    """Return the Euclidean norm over every entry of every tensor."""
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(p) for p in tree.values()]))


def relative_error(got: Params, expected: Params) -> float:
    """Return |got - expected| / |expected| of dictionaries as vectors, in float64; NaN if either has one."""
    difference = {name: got[name].double() - g.double() for name, g in expected.items()}
    return (global_norm(difference) / global_norm(expected).double()).item()


def is_finite(tree: Any) -> bool:
    """Return whether every entry of a tensor or a dictionary is finite, by one reduction that is read once."""
    leaves = [leaf for leaf in tree_flatten(tree)[0] if leaf.numel()]
    return bool(torch.isfinite(torch.nn.utils.get_total_norm(leaves, float("inf"))))


def check_finite(what: str, derivative: Any) -> None:
    """Raise ``NonFiniteGradientError``, naming the entry, if a derivative called ``what`` is not finite."""
    if not is_finite(derivative) and (found := first_nonfinite(derivative)):
        raise NonFiniteGradientError(found[0], value=found[1], what=what)


def first_nonfinite(derivative: Any) -> tuple[str, float] | None:
    """Return the name and value of the first NaN or infinite entry; a tensor outside a dictionary is called ``x``."""
    for name, part in derivative.items() if isinstance(derivative, dict) else (("x", derivative),):
        for leaf in tree_flatten(part)[0]:
            if (bad := leaf[~torch.isfinite(leaf)]).numel():
                return name, bad[0].item()
    return None
