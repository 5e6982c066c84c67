"""Every setting of the inner loop beyond a plain step, for tests over all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from metalearn import Episodes, Forward, InnerLoop, MetaGradient, Params, functionalize
from metalearn.core.params import relative_error
from metalearn.inner import (
    Adagrad,
    Adam,
    MetaCurvature,
    Momentum,
    PrototypeHead,
    RMSprop,
    ZeroContext,
    with_learned_lrs,
    with_per_step_params,
    with_transform,
)
from metalearn.models import MLP

HEAD = frozenset({"layers.4.weight", "layers.4.bias"})
NORM = frozenset({"layers.2.weight", "layers.2.bias"})
BODY = frozenset({"layers.1.weight", "layers.1.bias", *NORM})

SETTINGS: dict[str, Mapping[str, Any]] = {
    "momentum": {"rule": Momentum(0.8)},
    "nesterov": {"rule": Momentum(0.8, nesterov=True), "weight_decay": 0.1},
    "adam": {"rule": Adam(betas=(0.7, 0.9), eps=1e-2), "lr": 0.05},
    "dampening": {"rule": Momentum(0.8, dampening=0.4)},
    "rmsprop": {"rule": RMSprop(0.7, eps=1e-2), "lr": 0.05},
    "rmsprop, centered, momentum": {"rule": RMSprop(0.7, 1e-1, momentum=0.5, centered=True), "lr": 0.05},
    "adagrad": {"rule": Adagrad(eps=1e-2), "lr": 0.05},
    "adamw": {"rule": Adam(betas=(0.7, 0.9), eps=1e-2), "lr": 0.05, "decoupled_weight_decay": 0.4},
    "decoupled decay, step sizes by step and name": {
        "decoupled_weight_decay": 0.2,
        "lr_scale": lambda k, name: (0.3 if name in HEAD else 1.0) / (1 + k),
    },
    "schedule of learned rates": {"learned_lr": "layer", "lr_scale": lambda k, name: 0.5**k},
    "weight decay": {"weight_decay": 0.3},
    "clipping": {"clip_norm": 0.3},
    "clipping with momentum": {"rule": Momentum(0.5), "clip_norm": 0.3},
    "proximal": {"proximal_weight": 0.7},
    "rates of parameters": {"learned_lr": "parameter"},
    "rates of layers": {"learned_lr": "layer", "clip_norm": 0.3},
    "rates of layers and steps": {"learned_lr": "layer_and_step", "rule": Momentum(0.5)},
    "curvature": {"transform": MetaCurvature()},
    "curvature of the body, learned rates": {
        "transform": MetaCurvature(),
        "adapted_params": BODY,
        "learned_lr": "layer_and_step",
        "rule": Momentum(0.5),
        "clip_norm": 0.3,
    },
    "head alone": {"adapted_params": HEAD},
    "body alone, learned rates": {"adapted_params": BODY, "learned_lr": "parameter"},
    "weighted steps": {"query_weights": (0.1, 0.2, 0.0, 0.7)},
    "weighted steps without the last": {"query_weights": (0.0, 1.0, 0.5, 0.0)},
    "per-step BatchNorm": {"per_step_params": NORM},
    "per-step BatchNorm, not adapted": {"per_step_params": NORM, "adapted_params": BODY - NORM},
    "prototypes": {"initializer": PrototypeHead("layers.4.weight", "layers.4.bias")},
    "context": {"initializer": ZeroContext(frozenset({"layers.4.bias"})), "adapted_params": {"layers.4.bias"}},
    "all of MAML++": {
        "learned_lr": "layer_and_step",
        "per_step_params": NORM,
        "adapted_params": (BODY - NORM) | HEAD,
        "query_weights": (0.0, 0.3, 0.3, 0.4),
    },
}


def small_mlp() -> tuple[Forward, Params]:
    """Return a network of 4 inputs, 6 hidden units with BatchNorm and 3 classes in float64, and its parameters."""
    return functionalize(MLP(4, 3, hidden=(6,)).double())


def model_with_setting(setting: str, **more: Any) -> tuple[Forward, Params, InnerLoop]:
    """Return the small network, theta with random rates and per-step parameters, and the inner loop."""
    forward, theta = small_mlp()
    inner = InnerLoop(**{"lr": 0.2, "steps": 3, **SETTINGS[setting], **more})
    theta = with_transform(with_learned_lrs(with_per_step_params(theta, inner), inner), inner)
    return forward, {n: p + 0.05 * torch.randn_like(p) for n, p in theta.items()}, inner


def vectors(*, tasks: int = 3, ways: int = 3, shots: int = 2, queries: int = 3) -> Episodes:
    """Return random tasks with inputs of 4 numbers."""
    labels = torch.arange(ways)
    return Episodes(
        torch.randn(tasks, ways * shots, 4, dtype=torch.float64),
        labels.repeat_interleave(shots).repeat(tasks, 1),
        torch.randn(tasks, ways * queries, 4, dtype=torch.float64),
        labels.repeat_interleave(queries).repeat(tasks, 1),
    )


def sequences(tasks: int = 3, *, dtype: torch.dtype = torch.float32) -> Episodes:
    """Return random tasks of 6 support and 6 query sequences ``[5, 8]`` of 3 classes."""
    x, y = torch.randn(tasks, 6, 5, 8, dtype=dtype), torch.randint(3, (tasks, 6))
    return Episodes(x, y, x.flip(1), y.flip(1))


def assert_equal(got: MetaGradient, expected: MetaGradient, *, within: float = 1e-9) -> None:
    """Check that two results are equal up to rounding."""
    assert list(got.grads) == list(expected.grads)
    assert relative_error(got.grads, expected.grads) < within
    for name, g in expected.grads.items():  # separately, as the gradients of learned rates are small
        torch.testing.assert_close(got.grads[name], g, rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(got.support_loss, expected.support_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(got.predictions, expected.predictions)
