"""The meta-gradient against central differences of the adapted query loss, in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from metalearn import InnerLoop, Params, adapt, functionalize, meta_gradient
from metalearn.inner import task_losses
from metalearn.metagrad import ENGINES
from tests.factories import image_episodes
from tests.metagrad.models import MODELS


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("model", MODELS)
def test_second_order_equals_finite_differences(model: str, steps: int, engine: str) -> None:
    forward, theta = functionalize(MODELS[model]().double())
    episodes = image_episodes(shots=4, queries=4)  # BatchNorm over very few examples has too many kinks
    inner = InnerLoop(lr=0.05, steps=steps, engine=engine)
    grads = meta_gradient(forward, theta, episodes, inner).grads
    eps = 1e-8  # small, as ReLU and max-pooling have kinks

    @torch.no_grad()
    def loss_at(t: float, direction: Params) -> float:
        moved = {name: p + t * direction[name] if name in direction else p for name, p in theta.items()}
        fast = adapt(forward, moved, episodes.support_x, episodes.support_y, inner)
        return task_losses(forward, fast, episodes.query_x, episodes.query_y, loss=cross_entropy).losses.mean().item()

    # Along a random direction in each parameter by itself, so that no block of the gradient escapes; half of each is
    # the block's own gradient, so that the slope is not lost in the noise.
    for name, grad in grads.items():
        noise = torch.randn_like(grad)
        direction = grad / grad.norm().clamp_min(1e-12) + noise / noise.norm()
        slope = (loss_at(eps, {name: direction}) - loss_at(-eps, {name: direction})) / (2 * eps)
        expected = (grad * direction).sum().item()
        assert slope == pytest.approx(expected, rel=1e-5, abs=1e-6), name
