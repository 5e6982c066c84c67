"""Update rules: which way a task's parameters go, given the gradient of its support loss; differentiable throughout.

    theta_{k+1} = theta_k - alpha * d_k,    d_k = rule(g_0, ..., g_k),    g_k = dL_support(theta_k) / dtheta_k

A rule gives d_k. The step size alpha, fixed or learned, weight decay and clipping are settings of ``InnerLoop``, and go
with every rule. A rule of one's own is any object with the two members of ``UpdateRule``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from metalearn.core.types import Params

SEPARATOR = "::"
"""In the names of what is no parameter of the model: ``momentum::head.weight``, ``lr::head.weight``."""


def without_state(tree: Params) -> Params:
    """The model's own entries, without step sizes, statistics and what a rule remembers."""
    return {name: w for name, w in tree.items() if SEPARATOR not in name}


class UpdateRule(Protocol):
    """From gradients to directions, of T tasks at once. Make it a frozen dataclass: it is part of the settings."""

    def start(self, fast: Params) -> Params:
        """What the rule remembers, before the first step: tensors ``[T, ...]`` under names of ``state_key``.

        Args:
            fast: the parameters that are adapted, ``[T, ...]``.
        """

    def __call__(self, k: int, grads: Params, state: Params) -> tuple[Params, Params]:
        """Directions, named and shaped like the gradients, and the new state, all by differentiable operations.

        Args:
            k: number of the step, from 0.
            grads: every task's own gradients, ``[T, ...]``.
            state: what ``start`` or the step before gave.
        """


def state_key(kind: str, name: str) -> str:
    """What a rule remembers of a parameter: ``momentum::head.weight``."""
    return f"{kind}{SEPARATOR}{name}"


@dataclass(frozen=True)
class SGD:
    """d_k = g_k."""

    def start(self, fast: Params) -> Params:
        """Nothing."""
        return {}

    def __call__(self, k: int, grads: Params, state: Params) -> tuple[Params, Params]:
        """As ``UpdateRule``."""
        return grads, state


@dataclass(frozen=True)
class Momentum:
    """v_k = mu v_{k-1} + g_k, from v = 0;  d_k = v_k, or with Nesterov's g_k + mu v_k.

    As ``torch.optim.SGD`` without dampening (Sutskever et al. 2013, with the step size outside of v).

    Args:
        momentum: mu, at least 0 and below 1.
        nesterov: whether to look ahead.

    Raises:
        ValueError: if mu is out of range.
    """

    momentum: float = 0.9
    nesterov: bool = False

    def __post_init__(self) -> None:
        _check_fraction("Momentum", "momentum", self.momentum)

    def start(self, fast: Params) -> Params:
        """No velocity."""
        return {state_key("momentum", name): torch.zeros_like(w) for name, w in fast.items()}

    def __call__(self, k: int, grads: Params, state: Params) -> tuple[Params, Params]:
        """As ``UpdateRule``."""
        v = {name: self.momentum * state[state_key("momentum", name)] + g for name, g in grads.items()}
        directions = {name: g + self.momentum * v[name] for name, g in grads.items()} if self.nesterov else v
        return directions, {state_key("momentum", name): w for name, w in v.items()}


@dataclass(frozen=True)
class Adam:
    """d_k = m / (sqrt(v) + eps), with m and v the averages of g and g^2, corrected for their start at 0.

    As ``torch.optim.Adam`` (Kingma & Ba 2015, arXiv 1412.6980, algorithm 1). The first direction is g / (|g| + eps),
    whose derivative at g = 0 is 1 / eps: with the usual eps of 1e-8 meta-gradients may be huge where an entry of the
    gradient is nearly 0, and a larger one tames them. An entry that has always been 0 passes nothing through v.

    Args:
        betas: of the two averages, each at least 0 and below 1.
        eps: positive.

    Raises:
        ValueError: if a number is out of range.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        for beta in self.betas:
            _check_fraction("Adam", "betas", beta)
        if not self.eps > 0:
            raise ValueError(f"Adam: eps={self.eps!r}; it must be positive.")

    def start(self, fast: Params) -> Params:
        """Both averages are 0."""
        return {state_key(kind, name): torch.zeros_like(w) for kind in ("mean", "square") for name, w in fast.items()}

    def __call__(self, k: int, grads: Params, state: Params) -> tuple[Params, Params]:
        """As ``UpdateRule``."""
        of_mean, of_square = self.betas
        directions, after = {}, {}
        for name, g in grads.items():
            mean, square = (state_key(kind, name) for kind in ("mean", "square"))
            after[mean] = m = of_mean * state[mean] + (1 - of_mean) * g
            after[square] = v = of_square * state[square] + (1 - of_square) * g * g
            root = _sqrt(v / (1 - of_square ** (k + 1)))
            directions[name] = m / (1 - of_mean ** (k + 1)) / (root + self.eps)
        return directions, after


def _sqrt(v: Tensor) -> Tensor:
    """The square root, with derivative 0 and not infinity where ``v`` is 0."""
    positive = v > 0
    return torch.where(positive, torch.where(positive, v, 1.0).sqrt(), 0.0)


def clip_by_norm(grads: Params, largest: float) -> Params:
    """Every task's gradients scaled down to that norm over all of its parameters, if they exceed it.

    As ``torch.nn.utils.clip_grad_norm_``, task by task and differentiable.
    """
    squares = torch.stack([(g * g).flatten(1).sum(dim=1) for g in grads.values()]).sum(dim=0)  # [T]
    factor = (largest / (_sqrt(squares) + 1e-6)).clamp(max=1.0)
    return {name: broadcast_over_params(factor, g) * g for name, g in grads.items()}


def broadcast_over_params(factor: Tensor, like: Tensor) -> Tensor:
    """One number a task, ``[T]``, shaped so that it multiplies ``[T, ...]``."""
    return factor.view(-1, *[1] * (like.ndim - 1))


def _check_fraction(rule: str, name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{rule}: {name}={value!r}; it must be at least 0 and below 1.")
