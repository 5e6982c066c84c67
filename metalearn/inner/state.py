"""Inner-loop state of T tasks: fast weights, learned step sizes and the rule's state in one dictionary.

    state_0 = init_state(theta),    state_{k+1} = apply_update(state_k, g_k)

Every entry leads with the task dimension, and step sizes pass on unchanged. So an engine differentiates the whole
dictionary and needs to know neither the rule nor what is learned.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from metalearn.core.params import expand_over_tasks
from metalearn.core.text import plural
from metalearn.core.types import Examples, Forward, Params
from metalearn.inner.batch_norm_statistics import is_norm_statistic
from metalearn.inner.config import InnerLoop
from metalearn.inner.meta_tensors import is_meta, split_meta, taken_by
from metalearn.inner.transforms import GradientTransform
from metalearn.inner.update_rules import (
    SEPARATOR,
    UpdateRule,
    broadcast_over_params,
    clip_by_norm,
    state_key,
    without_state,
)

InnerState = Params
"""Fast weights and other entries that T tasks pass from one inner step to the next, each ``[T, ...]``."""

_LR, _ANCHOR, _TRANSFORM = "lr", "anchor", "transform"
_OUTSIDE_THE_RULE = tuple(state_key(kind, "") for kind in (_LR, _ANCHOR, _TRANSFORM))
_LEARNED_BY_TRANSFORM = state_key(_TRANSFORM, "")


def lr_key(name: str) -> str:
    """Return the name of a parameter's learned step size in theta: ``lr::head.weight``."""
    return state_key(_LR, name)


def with_learned_lrs(theta: Params, inner: InnerLoop) -> Params:
    """Return theta with the step sizes that ``inner.learned_lr`` asks for, all of them ``inner.lr``.

    They are ``lr::NAME`` for every adapted parameter: shaped like it, ``[]``, or ``[K]``.

    Examples:
        >>> theta = {"w": torch.zeros(3)}
        >>> with_learned_lrs(theta, InnerLoop(lr=0.1, steps=2, learned_lr="layer_and_step"))["lr::w"]
        tensor([0.1000, 0.1000])
    """
    if inner.learned_lr is None:
        return theta
    _check_param_names(theta, inner)
    names = inner.adapted_params or theta.keys()
    lrs = {lr_key(n): torch.full_like(p, inner.lr) for n, p in theta.items() if n in names}
    if inner.learned_lr != "parameter":
        shape = (inner.steps,) if inner.learned_lr == "layer_and_step" else ()
        lrs = {name: lr.new_full(shape, inner.lr) for name, lr in lrs.items()}
    return {**theta, **lrs}


def with_transform(theta: Params, inner: InnerLoop) -> Params:
    """Return theta with what ``inner.transform`` learns, as ``transform::NAME``.

    Examples:
        >>> theta = {"w": torch.zeros(3, 2)}
        >>> list(with_transform(theta, InnerLoop(lr=0.1, steps=2, transform=MetaCurvature())))
        ['w', 'transform::w/out', 'transform::w/in']
    """
    _check_param_names(theta, inner)
    return theta | _initial_transform(theta, inner)


def _initial_transform(theta: Params, inner: InnerLoop) -> Params:
    if inner.transform is None:
        return {}
    params = meta_params_at_step(theta, inner)
    adapted = {name: params[name].detach() for name in adapted_param_names(params, inner)}
    learned, device = inner.transform.init(adapted), next((p.device for p in adapted.values()), None)
    if elsewhere := [name for name, w in learned.items() if w.device != device]:
        raise ValueError(
            f"the transform {type(inner.transform).__name__}: init made {elsewhere[0]!r} on the device "
            f"{learned[elsewhere[0]].device}, and the parameters are on {device}; make it with device=p.device."
        )
    return {state_key(_TRANSFORM, name): w for name, w in learned.items()}


def with_per_step_params(theta: Params, inner: InnerLoop) -> Params:
    """Return theta with K + 1 copies, ``[K + 1, ...]``, of the parameters that ``inner.per_step_params`` names."""
    return {
        name: p.expand(inner.steps + 1, *p.shape).clone() if name in inner.per_step_params else p
        for name, p in theta.items()
    }


def init_state(
    forward: Forward, theta: Params, support_x: Examples, support_y: Examples, inner: InnerLoop
) -> InnerState:
    """Return the state of T tasks before the first step; differentiable in theta."""
    tasks = tree_leaves(support_x)[0].shape[0]
    fast = expand_over_tasks({name: p for name, p in theta.items() if not is_norm_statistic(name)}, tasks)
    if inner.initializer is not None:
        initial = inner.initializer(forward, without_state(fast), support_x, support_y)
        initial = {name: w for name, w in initial.items() if not is_meta(name)}  # it sees them, and changes none
        # As views: an inner gradient in one parameter must not run through another that was made from it.
        fast = {name: w.view_as(w) for name, w in {**fast, **initial}.items()}
    adapted = {name: fast[name] for name in adapted_param_names(fast, inner)}
    anchors = {state_key(_ANCHOR, name): w for name, w in adapted.items()} if inner.proximal_weight else {}
    with _check_stateless("rule", inner.rule):
        rule_state = inner.rule.init(adapted)
    if not isinstance(rule_state, dict) or any(SEPARATOR not in name for name in rule_state):
        raise ValueError(
            f"the rule {type(inner.rule).__name__}: init must return a dictionary of tensors under names that "
            "metalearn.inner.state_key(kind, name) makes."
        )
    return {**fast, **rule_state, **anchors}


def adapted_param_names(state: InnerState, inner: InnerLoop) -> list[str]:
    """Return the names of the parameters that an inner step changes."""
    chosen = inner.adapted_params
    return [n for n in without_state(state) if not is_meta(n) and (chosen is None or n in chosen)]


def params_at_step(state: InnerState, inner: InnerLoop, k: int) -> Params:
    """Return the model's parameters after k steps, ``[T, ...]``: of per-step parameters, value k or the last."""
    return {
        name: w[:, min(k, w.shape[1] - 1)] if name in inner.per_step_params else w
        for name, w in without_state(state).items()
    }


def meta_params_at_step(theta: Params, inner: InnerLoop, k: int = 0) -> Params:
    """Return the model's parameters after k steps from theta itself: of one model, ``[...]``."""
    return {name: w[0] for name, w in params_at_step({n: p.unsqueeze(0) for n, p in theta.items()}, inner, k).items()}


def apply_update(state: InnerState, grads: Params, inner: InnerLoop, k: int) -> InnerState:
    """Return the state of every task after step k; differentiable in the state and the gradients ``[T, ...]``."""
    if inner.clip_norm is not None:
        grads = clip_by_norm(grads, inner.clip_norm)
    if inner.weight_decay:
        grads = {name: g + inner.weight_decay * state[name] for name, g in grads.items()}
    if inner.proximal_weight:
        anchors = {name: state[state_key(_ANCHOR, name)] for name in grads}
        grads = {name: g + inner.proximal_weight * (state[name] - anchors[name]) for name, g in grads.items()}
    if (transform := inner.transform) is not None:
        grads = _apply_transform(transform, state, grads, k)
    # The direction of the update rule
    rule_state = {n: w for n, w in state.items() if SEPARATOR in n and not n.startswith(_OUTSIDE_THE_RULE)}
    with _check_stateless("rule", inner.rule):
        output = inner.rule.update(k, grads, rule_state, **taken_by(inner.rule.update, split_meta(state)[1]))
    directions, rule_state = _check_rule_output(inner, grads, output)
    if inner.decoupled_weight_decay:
        directions = {name: d + inner.decoupled_weight_decay * state[name] for name, d in directions.items()}
    # theta_{k+1} = theta_k - alpha * d_k
    fast = {name: state[name] - _lr_at_step(state, name, inner, k) * d for name, d in directions.items()}
    return {**state, **fast, **rule_state}


def _apply_transform(transform: GradientTransform, state: InnerState, grads: Params, k: int) -> Params:
    prefix = _LEARNED_BY_TRANSFORM
    learned = {name.removeprefix(prefix): w for name, w in state.items() if name.startswith(prefix)}
    with _check_stateless("transform", transform):
        transformed = transform.apply(k, grads, learned)
    if not isinstance(transformed, dict):
        raise TypeError(f"the transform {type(transform).__name__}: apply must return a dictionary of tensors.")
    _check_directions(f"the transform {type(transform).__name__}", grads, transformed)
    return transformed


@contextmanager
def _check_stateless(kind: str, used: UpdateRule | GradientTransform) -> Iterator[None]:
    """Check that a rule or transform does not change itself: engines that recompute a step would find it changed."""
    before = dict(getattr(used, "__dict__", {}))
    yield
    after = getattr(used, "__dict__", {})
    for name, value in after.items():
        is_new = name not in before and any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))
        if is_new or (name in before and value is not before[name]):
            raise ValueError(
                f"the {kind} {type(used).__name__} keeps {name!r} on itself, and engines that take a step again would "
                "find it changed. Let a rule return it in its state, under a name of metalearn.inner.state_key(kind, "
                "name)."
            )


def _check_rule_output(inner: InnerLoop, grads: Params, output: Any) -> tuple[Params, Params]:
    """Check the directions and the state that an update rule returned, and return them."""
    rule = type(inner.rule).__name__
    if not (isinstance(output, tuple) and len(output) == 2 and all(isinstance(part, dict) for part in output)):
        raise TypeError(f"the rule {rule} must return (directions, state), two dictionaries of tensors.")
    directions, rule_state = output
    _check_directions(f"the rule {rule}", grads, directions)
    if wrong := [name for name in rule_state if SEPARATOR not in name]:
        raise ValueError(
            f"the rule {rule}: its state has the name {wrong[0]!r}, which is a parameter's; make names with "
            "metalearn.inner.state_key(kind, name)."
        )
    return directions, rule_state


def _check_directions(who: str, grads: Params, directions: Params) -> None:
    for name in sorted({*directions, *grads}):
        shape, expected = (tuple(tree[name].shape) if name in tree else "missing" for tree in (directions, grads))
        if shape != expected:
            raise ValueError(
                f"{who}: its direction for {name!r} is {shape}, and the gradient is {expected}; give one "
                "direction for every gradient, shaped like it, with the task dimension."
            )


def _lr_at_step(state: InnerState, name: str, inner: InnerLoop, k: int) -> Tensor | float:
    lr = _unscaled_lr(state, name, inner, k)
    if inner.lr_scale is None:
        return lr
    scale = inner.lr_scale(k, name)
    is_number = isinstance(scale, Real) and not isinstance(scale, bool) and 0 <= float(scale) < math.inf
    if not is_number and not (isinstance(scale, Tensor) and scale.ndim == 0):
        raise ValueError(f"InnerLoop: lr_scale({k}, {name!r}) is {scale!r}; it must be a number, 0 or more.")
    return scale * lr


def _unscaled_lr(state: InnerState, name: str, inner: InnerLoop, k: int) -> Tensor | float:
    if inner.learned_lr is None:
        return inner.lr
    lr = state[lr_key(name)]
    if inner.learned_lr == "parameter":
        return lr
    if inner.learned_lr == "layer_and_step":
        lr = lr[:, min(k, lr.shape[1] - 1)]
    return broadcast_over_params(lr, state[name])


def check_params_match_config(theta: Params, inner: InnerLoop, *, training: bool = False) -> None:
    """Check that an inner loop fits the meta-parameters.

    In training per-step entries must be for exactly K steps; else the last one serves for more steps.

    Raises:
        ValueError: naming the missing, unknown or wrongly shaped entry, and the function that makes it.
    """
    _check_param_names(theta, inner)
    _check_transform(theta, inner)
    lrs = {n for n in theta if SEPARATOR in n and not is_norm_statistic(n) and not n.startswith(_LEARNED_BY_TRANSFORM)}
    expected = set() if inner.learned_lr is None else {lr_key(name) for name in adapted_param_names(theta, inner)}
    if lrs != expected:
        kind, names = ("lacks", expected - lrs) if expected - lrs else ("has", lrs - expected)
        raise ValueError(
            f"params {kind} {', '.join(sorted(names)[:3])}, and learned_lr={inner.learned_lr!r}: make params with "
            "metalearn.with_learned_lrs(theta, inner), which adds the step sizes that are learned."
        )
    for name in lrs:
        shape = tuple(theta[name].shape)
        expected_shape = {
            "parameter": tuple(theta[name.partition(SEPARATOR)[2]].shape),
            "layer": (),
            "layer_and_step": (inner.steps if training else max(shape, default=0),),
        }[str(inner.learned_lr)]
        if shape != expected_shape or (0 in shape and inner.steps > 0):
            raise ValueError(
                f"params[{name!r}] has shape {shape}, which is not that of learned_lr={inner.learned_lr!r} with "
                f"{plural(inner.steps, 'step')}; make it with metalearn.with_learned_lrs(theta, inner)."
            )
    for name in inner.per_step_params:
        shape = tuple(theta[name].shape)
        if not shape or shape[0] == 0 or (training and shape[0] != inner.steps + 1):
            raise ValueError(
                f"params[{name!r}] has shape {shape}, and per_step_params names it: it must lead with "
                f"{inner.steps + 1}, one for every number of steps, as metalearn.with_per_step_params(theta, inner) "
                "makes it."
            )


def _check_transform(theta: Params, inner: InnerLoop) -> None:
    """Check that theta has what the transform learns, in its shapes, and nothing of another."""
    given = {name: tuple(w.shape) for name, w in theta.items() if name.startswith(_LEARNED_BY_TRANSFORM)}
    if inner.transform is None and not given:  # as in most meta-steps: no tensor is made for the check
        return
    on_meta = {name: torch.empty_like(p, device="meta") for name, p in theta.items()}
    expected = {name: tuple(w.shape) for name, w in _initial_transform(on_meta, inner).items()}
    for name in sorted(expected.keys() | given.keys()):
        if given.get(name) != expected.get(name):
            raise ValueError(
                f"params[{name!r}] is {given.get(name, 'missing')}, and should be {expected.get(name, 'absent')} with "
                f"transform={inner.transform!r}: metalearn.with_transform(theta, inner) adds what a transform learns; "
                "leave out what is of another."
            )


def _check_param_names(theta: Params, inner: InnerLoop) -> None:
    for setting in ("adapted_params", "per_step_params"):
        if unknown := (getattr(inner, setting) or set()) - theta.keys():
            raise ValueError(
                f"InnerLoop: {setting} names {', '.join(sorted(unknown))}; the names in params are "
                f"{', '.join(without_state(theta))}."
            )
