"""Regression of several outputs, several labels, segmentation, forces: every engine equals autograd on one task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from metalearn import Episodes, InnerLoop, Loss, functionalize, meta_gradient
from metalearn.core.params import relative_error
from metalearn.metagrad.baselines.by_hand import meta_gradient as by_hand
from metalearn.metagrad.meta_gradient import ENGINES

INNER = InnerLoop(lr=0.2, steps=3)
Kind = tuple[Callable[[], nn.Module], Loss, Callable[[int, torch.Generator], tuple[Tensor, Tensor]]]


class Forces(nn.Module):
    """The negative gradient of an energy, by ``torch.func`` or, ``inside_autograd``, by ``torch.autograd.grad``."""

    def __init__(self, *, inside_autograd: bool) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1, bias=False))
        self.inside_autograd = inside_autograd

    def forward(self, x: Tensor) -> Tensor:
        if self.inside_autograd:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                return -torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]
        force: Tensor = torch.func.grad(lambda x: self.energy(x).sum())(x)
        return -force


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4))


def vectors(count: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    return tuple(torch.randn(4, count, size, generator=g, dtype=torch.float64) for size in (3, 4))  # type: ignore[return-value]


def several_labels(count: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    x, y = vectors(count, g)
    return x, (y > 0).double()


def maps(count: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(4, count, 2, 5, 6, generator=g, dtype=torch.float64)
    return x, torch.randint(3, (4, count, 5, 6), generator=g)


def positions(count: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    x, y = vectors(count, g)
    return x, y[..., :3]


KINDS: dict[str, Kind] = {
    "several outputs": (mlp, mse_loss, vectors),
    "several labels": (mlp, binary_cross_entropy_with_logits, several_labels),
    "segmentation": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 1)),
        cross_entropy,
        maps,
    ),
    "forces by torch.func": (lambda: Forces(inside_autograd=False), mse_loss, positions),
    "forces by autograd": (lambda: Forces(inside_autograd=True), mse_loss, positions),
}


@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", KINDS)
def test_kind_of_task_equals_autograd(kind: str, engine: str, second_order: bool) -> None:
    build, loss, draw = KINDS[kind]
    torch.manual_seed(0)
    module, generator = build().double(), torch.Generator().manual_seed(1)
    tasks = Episodes(*draw(5, generator), *draw(3, generator))
    forward, theta = functionalize(module)
    inner = replace(INNER, engine=engine, second_order=second_order)
    result = meta_gradient(forward, theta, tasks, inner, loss=loss)

    want = by_hand(module, tasks, inner, loss=loss)
    assert relative_error(result.grads, want.grads) < 1e-12
    torch.testing.assert_close(result.loss, want.loss, rtol=1e-12, atol=0)
