"""Update rules: from the gradients of a task's support loss to the direction of its step; differentiable throughout.

    theta_{k+1} = theta_k - alpha * d_k,    d_k = rule(g_0, ..., g_k),    g_k = dL_support(theta_k) / dtheta_k

A rule gives d_k. The step size alpha, fixed or learned, weight decay and clipping are settings of ``InnerLoop``, for
every rule. Any object with the two methods of ``UpdateRule`` is a rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from metalearn.core.deprecation import add_former_methods, adopt_former_methods
from metalearn.core.types import Params

SEPARATOR = "::"
"""In the names of entries that are no parameter of the model: ``momentum::head.weight``, ``lr::head.weight``."""


def without_state(tree: Params) -> Params:
    """Return the model's parameters, without step sizes, statistics and the rule's state."""
    return {name: w for name, w in tree.items() if SEPARATOR not in name}


def state_key(kind: str, name: str) -> str:
    """Return the name of a parameter's entry in a rule's state: ``momentum::head.weight``."""
    return f"{kind}{SEPARATOR}{name}"


class UpdateRule(Protocol):
    """Maps gradients to directions, for T tasks at once. Make it a frozen dataclass: it is part of the settings."""

    def init(self, fast: Params) -> Params:
        """Return the state before the first step from the adapted parameters: ``[T, ...]``, named by ``state_key``."""

    def update(self, k: int, grads: Params, state: Params) -> tuple[Params, Params]:
        """Return directions, named and shaped like the gradients, and the new state, by differentiable operations.

        ``k`` counts steps from 0; gradients are ``[T, ...]``; ``state`` is from ``init`` or the step before. May take
        meta-learned tensors by name as well, each ``[T, ...]``: ``meta_gradient(..., meta={"gain": gain})``.
        """


FORMER_METHODS = {"start": "init", "__call__": "update"}


class _Rule:
    """Base of the rules below. The former names of its methods still work, in calls and in subclasses."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        adopt_former_methods(cls, FORMER_METHODS)
        add_former_methods(cls, FORMER_METHODS)


@dataclass(frozen=True)
class SGD(_Rule):
    """d_k = g_k."""

    def init(self, fast: Params) -> Params:
        """Return an empty state."""
        return {}

    def update(self, k: int, grads: Params, state: Params) -> tuple[Params, Params]:
        """Return the gradients as directions."""
        return grads, state


@dataclass(frozen=True)
class Momentum(_Rule):
    """v_k = mu v_{k-1} + (1 - tau) g_k, from v_0 = g_0;  d_k = v_k, or with Nesterov's g_k + mu v_k.

    Equals ``torch.optim.SGD`` (Sutskever et al. 2013, with the step size outside of v). mu = ``momentum`` and tau =
    ``dampening`` must be at least 0 and below 1; Nesterov's has no dampening.
    """

    momentum: float = 0.9
    nesterov: bool = False
    dampening: float = 0.0

    def __post_init__(self) -> None:
        _check_fraction("Momentum", "momentum", self.momentum)
        _check_fraction("Momentum", "dampening", self.dampening)
        if self.nesterov and self.dampening:
            raise ValueError(f"Momentum: dampening={self.dampening!r} with nesterov=True; leave one out.")

    def init(self, fast: Params) -> Params:
        """Return zero velocities."""
        return {state_key("momentum", name): torch.zeros_like(w) for name, w in fast.items()}

    def update(self, k: int, grads: Params, state: Params) -> tuple[Params, Params]:
        """Return the directions and the new velocities."""
        share = 1 - self.dampening if k else 1.0
        v = {name: self.momentum * state[state_key("momentum", name)] + share * g for name, g in grads.items()}
        directions = {name: g + self.momentum * v[name] for name, g in grads.items()} if self.nesterov else v
        return directions, {state_key("momentum", name): w for name, w in v.items()}


@dataclass(frozen=True)
class Adam(_Rule):
    """d_k = m / (sqrt(v) + eps), with m and v the averages of g and g^2, corrected for their start at 0.

    Equals ``torch.optim.Adam`` (Kingma & Ba 2015, arXiv 1412.6980, algorithm 1). The first direction is g / (|g| + eps)
    with derivative 1 / eps at g = 0: with the usual eps of 1e-8 meta-gradients may be huge where an entry of the
    gradient is nearly 0, and a larger one tames them. An entry that has always been 0 passes nothing through v.

    ``betas`` of the two averages must be at least 0 and below 1, and ``eps`` positive.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        for beta in self.betas:
            _check_fraction("Adam", "betas", beta)
        _check_positive("Adam", "eps", self.eps)

    def init(self, fast: Params) -> Params:
        """Return zero averages."""
        return {state_key(kind, name): torch.zeros_like(w) for kind in ("mean", "square") for name, w in fast.items()}

    def update(self, k: int, grads: Params, state: Params) -> tuple[Params, Params]:
        """Return the directions and the new averages."""
        beta_1, beta_2 = self.betas
        directions, new_state = {}, {}
        for name, g in grads.items():
            mean, square = state_key("mean", name), state_key("square", name)
            new_state[mean] = m = beta_1 * state[mean] + (1 - beta_1) * g
            new_state[square] = v = beta_2 * state[square] + (1 - beta_2) * g * g
            root = _sqrt_with_zero_grad(v / (1 - beta_2 ** (k + 1)))
            directions[name] = m / (1 - beta_1 ** (k + 1)) / (root + self.eps)
        return directions, new_state


@dataclass(frozen=True)
class RMSprop(_Rule):
    """d_k = g_k / (sqrt(v) + eps), with v the average of g^2, or ``centered`` the variance; then momentum.

    Equals ``torch.optim.RMSprop`` (Tieleman & Hinton 2012, lecture 6.5; centered: Graves 2013, arXiv 1308.0850,
    section 4.2). ``decay`` (torch's alpha) and ``momentum`` must be at least 0 and below 1, and ``eps`` positive; the
    first direction has the derivative 1 / eps at g = 0, as Adam's.
    """

    decay: float = 0.99
    eps: float = 1e-8
    momentum: float = 0.0
    centered: bool = False

    def __post_init__(self) -> None:
        _check_fraction("RMSprop", "decay", self.decay)
        _check_fraction("RMSprop", "momentum", self.momentum)
        _check_positive("RMSprop", "eps", self.eps)
        if self.centered and not self.decay:
            raise ValueError("RMSprop: decay=0 with centered=True; a variance needs more than the last gradient.")

    def init(self, fast: Params) -> Params:
        """Return zero averages."""
        kinds = ("square", *(["mean"] if self.centered else []), *(["momentum"] if self.momentum else []))
        return {state_key(kind, name): torch.zeros_like(w) for kind in kinds for name, w in fast.items()}

    def update(self, k: int, grads: Params, state: Params) -> tuple[Params, Params]:
        """Return the directions and the new averages."""
        directions, new_state = {}, {}
        for name, g in grads.items():
            square, mean, momentum = (state_key(kind, name) for kind in ("square", "mean", "momentum"))
            new_state[square] = v = self.decay * state[square] + (1 - self.decay) * g * g
            if self.centered:
                new_state[mean] = self.decay * state[mean] + (1 - self.decay) * g
                # The average of g^2 less m^2, by a recursion that does not cancel
                v = self.decay * state[square] + self.decay * (1 - self.decay) * (g - state[mean]) ** 2
                new_state[square] = v
            d = g / (_sqrt_with_zero_grad(v) + self.eps)
            if self.momentum:
                new_state[momentum] = d = self.momentum * state[momentum] + d
            directions[name] = d
        return directions, new_state


@dataclass(frozen=True)
class Adagrad(_Rule):
    """d_k = g_k / (sqrt(v) + eps), with v the sum of the g^2 so far.

    Equals ``torch.optim.Adagrad`` (Duchi, Hazan & Singer 2011, JMLR 12, section 1.3). ``eps`` must be positive, and
    ``initial_sum`` at least 0: above it, the first directions have small derivatives.
    """

    eps: float = 1e-10
    initial_sum: float = 0.0

    def __post_init__(self) -> None:
        _check_positive("Adagrad", "eps", self.eps)
        if not self.initial_sum >= 0:
            raise ValueError(f"Adagrad: initial_sum={self.initial_sum!r}; it must be at least 0.")

    def init(self, fast: Params) -> Params:
        """Return the initial sums."""
        return {state_key("square", name): torch.full_like(w, self.initial_sum) for name, w in fast.items()}

    def update(self, k: int, grads: Params, state: Params) -> tuple[Params, Params]:
        """Return the directions and the new sums."""
        sums = {name: state[state_key("square", name)] + g * g for name, g in grads.items()}
        directions = {name: g / (_sqrt_with_zero_grad(sums[name]) + self.eps) for name, g in grads.items()}
        return directions, {state_key("square", name): v for name, v in sums.items()}


def _check_positive(rule: str, name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{rule}: {name}={value!r}; it must be positive.")


def _check_fraction(rule: str, name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{rule}: {name}={value!r}; it must be at least 0 and below 1.")


def _sqrt_with_zero_grad(v: Tensor) -> Tensor:
    """Return the square root, with derivative 0 and not infinity where ``v`` is 0."""
    positive = v > 0
    return torch.where(positive, torch.where(positive, v, 1.0).sqrt(), 0.0)


def clip_by_norm(grads: Params, max_norm: float) -> Params:
    """Scale each task's gradients down to a norm over all its parameters, if they exceed it.

    Equals ``torch.nn.utils.clip_grad_norm_`` for each task, and is differentiable.
    """
    squares = torch.stack([(g * g).flatten(1).sum(dim=1) for g in grads.values()]).sum(dim=0)  # [T]
    factor = (max_norm / (_sqrt_with_zero_grad(squares) + 1e-6)).clamp(max=1.0)
    return {name: broadcast_over_params(factor, g) * g for name, g in grads.items()}


def broadcast_over_params(factor: Tensor, like: Tensor) -> Tensor:
    """Reshape one number for each task, ``[T]``, so that it multiplies ``[T, ...]``."""
    return factor.view(-1, *[1] * (like.ndim - 1))
