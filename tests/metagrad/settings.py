"""Every setting of the inner loop beyond a plain step, for tests over all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from metalearn import Episodes, Forward, InnerLoop, Params, functionalize
from metalearn.inner import Adam, Momentum, PrototypeHead, ZeroContext, with_learned_lrs, with_per_step_params
from metalearn.models import MLP

HEAD = frozenset({"layers.4.weight", "layers.4.bias"})
NORM = frozenset({"layers.2.weight", "layers.2.bias"})
BODY = frozenset({"layers.1.weight", "layers.1.bias", *NORM})

SETTINGS: dict[str, Mapping[str, Any]] = {
    "momentum": {"rule": Momentum(0.8)},
    "nesterov": {"rule": Momentum(0.8, nesterov=True), "weight_decay": 0.1},
    "adam": {"rule": Adam(betas=(0.7, 0.9), eps=1e-2), "lr": 0.05},
    "weight decay": {"weight_decay": 0.3},
    "clipping": {"clip_norm": 0.3},
    "clipping with momentum": {"rule": Momentum(0.5), "clip_norm": 0.3},
    "proximal": {"proximal_weight": 0.7},
    "rates of parameters": {"learned_lr": "parameter"},
    "rates of layers": {"learned_lr": "layer", "clip_norm": 0.3},
    "rates of layers and steps": {"learned_lr": "layer_and_step", "rule": Momentum(0.5)},
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


def model_with_setting(setting: str, **more: Any) -> tuple[Forward, Params, InnerLoop]:
    """Return a small network in float64, theta with random rates and per-step parameters, and the inner loop."""
    forward, theta = functionalize(MLP(4, 3, hidden=(6,)).double())
    inner = InnerLoop(**{"lr": 0.2, "steps": 3, **SETTINGS[setting], **more})
    theta = with_learned_lrs(with_per_step_params(theta, inner), inner)
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
