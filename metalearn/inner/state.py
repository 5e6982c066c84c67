"""What T tasks carry from one inner step to the next: parameters, learned step sizes and the rule's state, in one dict.

    carry_0 = begin(theta),    carry_{k+1} = update(carry_k, g_k)

Everything leads with the task dimension, and step sizes pass on unchanged, so that an engine takes the whole dictionary
for what it differentiates: it needs to know neither the rule nor what is learned.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from metalearn.core.functional import expand_over_tasks
from metalearn.core.types import Forward, Params
from metalearn.inner.batch_norm_statistics import is_norm_statistic
from metalearn.inner.config import InnerLoop
from metalearn.inner.update_rules import SEPARATOR, broadcast_over_params, clip_by_norm, state_key, without_state

_RATE, _ANCHOR = "lr", "anchor"


def lr_key(name: str) -> str:
    """The learned step size of a parameter, in theta: ``lr::head.weight``."""
    return state_key(_RATE, name)


def with_learned_lrs(theta: Params, inner: InnerLoop) -> Params:
    """Theta with the step sizes that ``inner.learned_lr`` asks for, all of them ``inner.lr``.

    Returns:
        ``theta`` and, for every adapted parameter, ``lr::NAME``: shaped like it, ``[]``, or ``[K]``.

    Example:
        >>> theta = {"w": torch.zeros(3)}
        >>> with_learned(theta, InnerLoop(lr=0.1, steps=2, learned_lr="layer_and_step"))["lr::w"]
        tensor([0.1000, 0.1000])
    """
    if inner.learned_lr is None:
        return theta
    _refuse_unknown(theta, inner)
    names = inner.adapted or theta.keys()
    rates = {lr_key(n): torch.full_like(p, inner.lr) for n, p in theta.items() if n in names}
    if inner.learned_lr != "parameter":
        shape = (inner.steps,) if inner.learned_lr == "layer_and_step" else ()
        rates = {name: rate.new_full(shape, inner.lr) for name, rate in rates.items()}
    return {**theta, **rates}


def with_per_step_params(theta: Params, inner: InnerLoop) -> Params:
    """Theta with K + 1 copies of the parameters that ``inner.per_step`` names, ``[K + 1, ...]``."""
    return {n: p.expand(inner.steps + 1, *p.shape).clone() if n in inner.per_step else p for n, p in theta.items()}


def init_state(forward: Forward, theta: Params, support_x: Tensor, support_y: Tensor, inner: InnerLoop) -> Params:
    """What T tasks carry into their first step; differentiable in theta."""
    fast = expand_over_tasks({name: p for name, p in theta.items() if not is_norm_statistic(name)}, support_x.shape[0])
    if inner.start is not None:
        started = inner.start(forward, without_state(fast), support_x, support_y)
        # As views: an inner gradient in one parameter must not run through another that was made from it.
        fast = {name: w.view_as(w) for name, w in {**fast, **started}.items()}
    own = {name: fast[name] for name in adapted_param_names(fast, inner)}
    anchors = {state_key(_ANCHOR, name): w for name, w in own.items()} if inner.proximal else {}
    with _pure(inner):
        state = inner.rule.start(own)
    if not isinstance(state, dict) or any(SEPARATOR not in name for name in state):
        raise ValueError(
            f"the rule {type(inner.rule).__name__}: start must return a dictionary of tensors under names that "
            "metalearn.inner.state_name(kind, name) makes."
        )
    return {**fast, **state, **anchors}


def adapted_param_names(carry: Params, inner: InnerLoop) -> list[str]:
    """The parameters that an inner step changes."""
    return [name for name in without_state(carry) if inner.adapted is None or name in inner.adapted]


def params_at_step(carry: Params, inner: InnerLoop, k: int) -> Params:
    """What the model is given after k steps, ``[T, ...]``: its parameters, and of those of every step the k-th.

    After more steps than were trained the last of them stand.
    """
    return {
        name: w[:, min(k, w.shape[1] - 1)] if name in inner.per_step else w for name, w in without_state(carry).items()
    }


def meta_params_at_step(theta: Params, inner: InnerLoop, k: int = 0) -> Params:
    """As ``params_at_step``, of theta itself: one model's parameters, ``[...]``."""
    return {name: w[0] for name, w in params_at_step({n: p.unsqueeze(0) for n, p in theta.items()}, inner, k).items()}


def apply_update(carry: Params, grads: Params, inner: InnerLoop, k: int) -> Params:
    """The k-th step of every task; differentiable in both.

    Args:
        carry: before the step.
        grads: of the adapted parameters, ``[T, ...]``.
        inner: the settings.
        k: from 0.
    """
    if inner.clip_norm is not None:
        grads = clip_by_norm(grads, inner.clip_norm)
    if inner.weight_decay:
        grads = {name: g + inner.weight_decay * carry[name] for name, g in grads.items()}
    if inner.proximal:
        anchors = {name: carry[state_key(_ANCHOR, name)] for name in grads}
        grads = {name: g + inner.proximal * (carry[name] - anchors[name]) for name, g in grads.items()}
    state = {
        n: w for n, w in carry.items() if SEPARATOR in n and not n.startswith((lr_key(""), state_key(_ANCHOR, "")))
    }
    with _pure(inner):
        returned = inner.rule(k, grads, state)
    directions, state = _as_promised(inner, grads, returned)
    fast = {name: carry[name] - _lr_at_step(carry, name, inner, k) * d for name, d in directions.items()}
    return {**carry, **fast, **state}


@contextmanager
def _pure(inner: InnerLoop) -> Iterator[None]:
    """Refuse a rule that keeps something on itself: engines that take a step again would find it changed."""
    kept = dict(getattr(inner.rule, "__dict__", {}))
    yield
    now = getattr(inner.rule, "__dict__", {})
    for name, value in now.items():
        new = name not in kept and any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))
        if new or (name in kept and value is not kept[name]):
            raise ValueError(
                f"the rule {type(inner.rule).__name__} keeps {name!r} on itself, and engines that take a step again "
                "would find it changed. Return it in the state, under a name of metalearn.inner.state_name(kind, name)."
            )


def _as_promised(inner: InnerLoop, grads: Params, returned: Any) -> tuple[Params, Params]:
    """Refuse what an update rule of one's own may return by mistake."""
    rule = type(inner.rule).__name__
    if not (isinstance(returned, tuple) and len(returned) == 2 and all(isinstance(part, dict) for part in returned)):
        raise TypeError(f"the rule {rule} must return (directions, state), two dictionaries of tensors.")
    directions, state = returned
    for name in sorted({*directions, *grads}):
        got, wanted = (tuple(tree[name].shape) if name in tree else "missing" for tree in (directions, grads))
        if got != wanted:
            raise ValueError(
                f"the rule {rule}: its direction for {name!r} is {got}, and the gradient is {wanted}; give one "
                "direction for every gradient, shaped like it, with the task dimension."
            )
    if wrong := [name for name in state if SEPARATOR not in name]:
        raise ValueError(
            f"the rule {rule}: its state has the name {wrong[0]!r}, which is a parameter's; make names with "
            "metalearn.inner.state_name(kind, name)."
        )
    return directions, state


def _lr_at_step(carry: Params, name: str, inner: InnerLoop, k: int) -> Tensor | float:
    if inner.learned_lr is None:
        return inner.lr
    rate = carry[lr_key(name)]
    if inner.learned_lr == "parameter":
        return rate
    if inner.learned_lr == "layer_and_step":
        rate = rate[:, min(k, rate.shape[1] - 1)]
    return broadcast_over_params(rate, carry[name])


def check_params_match_config(theta: Params, inner: InnerLoop, *, training: bool = False) -> None:
    """Refuse an inner loop that does not fit the meta-parameters.

    Args:
        theta: the meta-parameters.
        inner: the settings.
        training: whether what every step has of its own must be of these K steps; else the last one stands for more.

    Raises:
        ValueError: naming what is missing, unknown or of another shape, and what makes it.
    """
    _refuse_unknown(theta, inner)
    rates = {name for name in theta if SEPARATOR in name and not is_norm_statistic(name)}
    wanted = set() if inner.learned_lr is None else {lr_key(name) for name in adapted_param_names(theta, inner)}
    if rates != wanted:
        kind, names = ("lacks", wanted - rates) if wanted - rates else ("has", rates - wanted)
        raise ValueError(
            f"params {kind} {', '.join(sorted(names)[:3])}, and learned_lr={inner.learned_lr!r}: "
            "make params with metalearn.with_learned(theta, inner), which adds the step sizes that are learned."
        )
    for name in rates:
        shape, of_weight = tuple(theta[name].shape), tuple(theta[name.partition(SEPARATOR)[2]].shape)
        expected = {
            "parameter": of_weight,
            "layer": (),
            "layer_and_step": (inner.steps if training else max(shape, default=0),),
        }
        if shape != expected[str(inner.learned_lr)] or (0 in shape and inner.steps > 0):
            raise ValueError(
                f"params[{name!r}] has shape {shape}, which is not that of learned_lr={inner.learned_lr!r} with "
                f"{inner.steps} steps; make it with metalearn.with_learned(theta, inner)."
            )
    for name in inner.per_step:
        shape = tuple(theta[name].shape)
        if not shape or shape[0] == 0 or (training and shape[0] != inner.steps + 1):
            raise ValueError(
                f"params[{name!r}] has shape {shape}, and per_step names it: it must lead with {inner.steps + 1}, one "
                "for every number of steps, as metalearn.with_steps(theta, inner) makes it."
            )


def _refuse_unknown(theta: Params, inner: InnerLoop) -> None:
    for setting in ("adapted", "per_step"):
        if unknown := (getattr(inner, setting) or set()) - theta.keys():
            raise ValueError(
                f"InnerLoop: {setting} names {', '.join(sorted(unknown))}, which params has not; it has "
                f"{', '.join(without_state(theta))}."
            )
