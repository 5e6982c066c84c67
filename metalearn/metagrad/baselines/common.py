"""Where a peer's meta-gradient is taken: at a module's own parameters, or at a theta that is given."""

from __future__ import annotations

import copy

import torch
from torch import nn

from metalearn.core.functional import check_params
from metalearn.core.types import Params
from metalearn.inner import InnerLoop, check_params_match_config, without_state


def trainable(module: nn.Module) -> Params:
    """The parameters that ``functionalize`` makes theta of, themselves and no copies."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def leaves(module: nn.Module, params: Params | None, inner: InnerLoop) -> Params:
    """Theta as leaves that require gradients, in the order that it is given in.

    Args:
        module: whose parameters theta names.
        params: theta, with learned step sizes if ``inner`` has them; ``None``: the module's own.
        inner: the settings.

    Raises:
        TypeError: if one is not a floating-point tensor.
        ValueError: naming what the module or ``inner`` does not go with.
    """
    own = trainable(module)
    theta = own if params is None else params
    check_params(theta)
    check_params_match_config(theta, inner)
    _refuse_misfits(own, theta)
    return {name: p if p is own.get(name) else p.detach().requires_grad_() for name, p in theta.items()}


def placed(module: nn.Module, params: Params | None, inner: InnerLoop) -> tuple[nn.Module, Params]:
    """A module with theta for its parameters, and theta: those parameters, and the learned step sizes as leaves.

    The module is the one that is given if the parameters are its own already, and else a copy.

    Raises:
        TypeError, ValueError: as ``leaves``.
    """
    theta = leaves(module, params, inner)
    if any(theta[name] is not p for name, p in trainable(module).items()):
        module = copy.deepcopy(module)
        write(module, theta)
    return module, {**theta, **trainable(module)}  # the first keeps the order


def write(module: nn.Module, params: Params) -> None:
    """Copy theta's values into a module's parameters.

    Raises:
        TypeError: if one is not a floating-point tensor.
        ValueError: naming a parameter that the module has not, or in another shape, precision or place.
    """
    own = trainable(module)
    check_params(params)
    _refuse_misfits(own, params)
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(params[name])


def _refuse_misfits(own: Params, params: Params) -> None:
    model = without_state(params)
    if model.keys() != own.keys():
        kind, names = ("lacks", own.keys() - model.keys()) if own.keys() - model.keys() else ("has", model.keys() - own)
        raise ValueError(
            f"params {kind} {', '.join(sorted(names)[:3])}; the module's trainable parameters are {', '.join(own)}."
        )
    for name, p in own.items():
        given, needed = ((t.dtype, t.device, tuple(t.shape)) for t in (model[name], p))
        if given != needed:
            raise ValueError(
                f"params[{name!r}] is {_shown(*given)}, and the module's is {_shown(*needed)}; move the module to "
                "where theta is: module.to(device, dtype)."
            )


def _shown(dtype: torch.dtype, device: torch.device, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)} on {device}"
