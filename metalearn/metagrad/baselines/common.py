"""Shared by the baselines: supported settings, theta as a module's parameters, the mean over tasks, and imports."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import io
import reprlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import MISSING, Field, fields
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from metalearn.core.errors import ConfigError
from metalearn.core.params import check_params, grad_of
from metalearn.core.types import Episodes, Loss, MetaGradient, Params
from metalearn.inner import SGD, InnerLoop, Momentum, check_params_match_config, without_state


class Baseline(Protocol):
    """Computes ``metalearn.meta_gradient`` by another library, or by hand."""

    def __call__(
        self, module: nn.Module, episodes: Episodes, inner: InnerLoop, *, loss: Loss = ..., params: Params | None = None
    ) -> MetaGradient:
        """Compute the meta-gradient; neither the module's parameters nor their ``.grad`` are changed.

        Args:
            module: the model; where the library writes to it and ``params`` are given, a copy is used.
            episodes: T tasks.
            inner: the inner loop; ``engine`` and ``task_chunk`` are ignored.
            loss: one task's mean loss, by default ``cross_entropy``.
            params: theta, in place of the module's own parameters.

        Raises:
            UnsupportedSettingError: for a setting that the library does not support.
            ValueError: if ``params`` are not the module's.
        """


PEERS = {"learn2learn": "learn2learn", "higher": "higher", "TorchOpt": "torchopt"}
"""The other libraries, and their modules in ``metalearn.metagrad.baselines``, named like the packages they import."""

NOT_INSTALLED = "not installed"


def installed_peers(
    modules: Mapping[str, str] = PEERS, package: str = "metalearn.metagrad.baselines"
) -> tuple[dict[str, Baseline], dict[str, str]]:
    """Import the libraries; return those that work, and for the others ``NOT_INSTALLED`` or the error."""
    peers: dict[str, Baseline] = {}
    missing: dict[str, str] = {}
    for name, module in modules.items():
        try:
            with redirect_stderr(io.StringIO()):  # learn2learn imports gym, which prints that it is unmaintained
                peers[name] = importlib.import_module(f"{package}.{module}").meta_gradient
        except ImportError as error:
            is_installed = importlib.util.find_spec(module) is not None
            missing[name] = f"cannot be imported ({error})" if is_installed else NOT_INSTALLED
    return peers, missing


SupportedSettings = Mapping[str, Sequence[object] | None]
"""Settings of ``InnerLoop`` that a library computes, and which values: ``None`` for all, of rules the classes."""

_ALWAYS_SUPPORTED = frozenset({"lr", "steps", "second_order"})
_IGNORED = frozenset({"engine", "task_chunk", "checkpoint_every"})  # change how it is computed, and not what


class UnsupportedSettingError(ConfigError, ValueError):
    """An inner loop that another library does not compute."""

    def __init__(self, library: str, setting: str, offered: str) -> None:
        super().__init__(
            f"{library} does not offer {setting}; {offered}. Leave it out, or take metalearn's own engines "
            "(algorithm.backend=metalearn), which offer all."
        )


def check_supported(name: str, inner: InnerLoop, supported: SupportedSettings) -> None:
    """Check that a library computes all of an inner loop: an ignored setting would give the numbers of another one.

    Raises:
        UnsupportedSettingError: naming the first unsupported setting without its default, and what the library offers.
    """
    for setting in fields(InnerLoop):
        value = getattr(inner, setting.name)
        if setting.name not in _ALWAYS_SUPPORTED | _IGNORED and not _is_supported(setting, value, supported):
            offered = "it offers plain gradient steps"
            for key, values in supported.items():
                names = [v.__name__ if isinstance(v, type) else repr(v) for v in values or ()]
                offered += f" and {key}={' or '.join(names)}" if names else f" and {key}"
            raise UnsupportedSettingError(name, f"{setting.name}={reprlib.repr(value)}", offered)


def _is_supported(setting: Field[object], value: object, supported: SupportedSettings) -> bool:
    if setting.name == "rule":  # by its exact class, as a subclass may compute anything
        return type(value) in (supported.get("rule") or (SGD,))
    default = setting.default if setting.default_factory is MISSING else setting.default_factory()
    values = supported.get(setting.name, ())
    return value == default or values is None or value in values


def trainable(module: nn.Module) -> Params:
    """Return the module's own trainable parameters, which ``functionalize`` copies to theta."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def as_leaf_params(module: nn.Module, params: Params | None, inner: InnerLoop) -> Params:
    """Return theta, by default the module's own parameters, as leaves that require gradients, in the given order.

    Raises:
        TypeError: if one is not a floating-point tensor.
        ValueError: naming an entry that does not fit the module or ``inner``.
    """
    own = trainable(module)
    theta = own if params is None else params
    check_params(theta)
    check_params_match_config(theta, inner)
    _check_params_match_module(own, theta)
    return {name: p if p is own.get(name) else p.detach().requires_grad_() for name, p in theta.items()}


def module_with_params(module: nn.Module, params: Params | None, inner: InnerLoop) -> tuple[nn.Module, Params]:
    """Return a module whose parameters are theta, and theta: these parameters, and learned step sizes as leaves.

    It is the given module if theta is its own parameters, and else a copy.
    """
    theta = as_leaf_params(module, params, inner)
    if any(theta[name] is not p for name, p in trainable(module).items()):
        module = copy.deepcopy(module)
        copy_params_(module, theta)
    return module, {**theta, **trainable(module)}  # in the order of theta


def copy_params_(module: nn.Module, params: Params) -> None:
    """Copy theta's values into a module's parameters; raise if names, shapes, dtypes or devices differ."""
    own = trainable(module)
    check_params(params)
    _check_params_match_module(own, params)
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(params[name])


def _check_params_match_module(own: Params, params: Params) -> None:
    model = without_state(params)
    if model.keys() != own.keys():
        kind, names = ("lacks", own.keys() - model.keys()) if own.keys() - model.keys() else ("has", model.keys() - own)
        raise ValueError(
            f"params {kind} {', '.join(sorted(names)[:3])}; the module's trainable parameters are {', '.join(own)}."
        )
    for name, p in own.items():
        given, needed = (
            f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)} on {t.device}" for t in (model[name], p)
        )
        if given != needed:
            raise ValueError(
                f"params[{name!r}] is {given}, and the module's is {needed}; move the module to where theta is: "
                "module.to(device, dtype)."
            )


class TaskResult(NamedTuple):
    """Contribution of one task to the mean: its query loss and prediction with a graph, and detached support losses.

    ``at`` has the tensors whose gradients are theta's, by theta's names.
    """

    query_loss: Tensor
    prediction: Tensor
    support_losses: list[Tensor]
    at: Params


def average_over_tasks(one_task: Callable[..., TaskResult], theta: Params, episodes: Episodes) -> MetaGradient:
    """Compute ``one_task(support_x, support_y, query_x, query_y)`` for each task, and the mean over tasks."""
    grads = {name: torch.zeros_like(p) for name, p in theta.items()}
    losses, predictions, support_losses = [], [], []
    for task in zip(episodes.support_x, episodes.support_y, episodes.query_x, episodes.query_y, strict=True):
        result = one_task(*task)
        for name, g in grad_of(result.query_loss / episodes.tasks, result.at, create_graph=False).items():
            grads[name] += g
        losses.append(result.query_loss.detach())
        predictions.append(result.prediction.detach())
        support_losses.append(torch.stack(result.support_losses) if result.support_losses else losses[0].new_empty(0))
    return MetaGradient(
        loss=torch.stack(losses).mean(),
        grads=grads,
        predictions=torch.stack(predictions),
        support_loss=torch.stack(support_losses).mean(dim=0),
    )


def sgd_arguments(inner: InnerLoop) -> dict[str, Any]:
    """Return the arguments of a library's SGD for the rules ``SGD`` and ``Momentum``."""
    momentum = inner.rule.momentum if isinstance(inner.rule, Momentum) else 0.0
    dampening = inner.rule.dampening if isinstance(inner.rule, Momentum) else 0.0
    # torch refuses Nesterov's momentum of 0, which is the same as none
    nesterov = isinstance(inner.rule, Momentum) and inner.rule.nesterov and momentum > 0
    decay = inner.weight_decay
    return {"lr": inner.lr, "momentum": momentum, "dampening": dampening, "nesterov": nesterov, "weight_decay": decay}
