"""CAVIA: the models, and their meta-gradient against the algorithm written out, one task at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, max_pool2d, mse_loss, relu

from metalearn import Episodes, InnerLoop, Loss, Params, functionalize, meta_gradient, module_parts
from metalearn.core.params import relative_error
from metalearn.inner import ZeroContext, adapt
from metalearn.metagrad import ENGINES
from metalearn.models import ContextConv4, ContextMLP, Conv4
from tests.factories import image_episodes

CONTEXT = frozenset({"context"})


def curves() -> Episodes:
    return Episodes(*(torch.randn(3, *shape, dtype=torch.float64) for shape in ((4, 2), (4, 1), (5, 2), (5, 1))))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Episodes], Loss]] = {
    "mlp": (lambda: ContextMLP(2, 1, hidden=(7, 6), context=4), curves, mse_loss),
    "conv4, stride": (
        lambda: ContextConv4(3, width=4, pool="stride", context=5),
        lambda: image_episodes(size=8, shots=2),
        cross_entropy,
    ),
    "conv4, max": (
        lambda: ContextConv4(3, width=3, pool="max", context=5),
        lambda: image_episodes(size=16, tasks=2),
        cross_entropy,
    ),
}


def cavia(module: nn.Module, episodes: Episodes, loss: Loss, *, lr: float, steps: int, second_order: bool) -> Params:
    """Run algorithm 1: adapt phi from 0 by gradient descent, theta unchanged; return the query gradient in theta."""
    theta = {name: p.detach().requires_grad_() for name, p in module.named_parameters() if name != "context"}
    total = torch.zeros((), dtype=torch.float64)
    for support_x, support_y, query_x, query_y in zip(*vars(episodes).values(), strict=True):
        phi = torch.zeros(module.get_parameter("context").shape, dtype=torch.float64, requires_grad=True)
        for _ in range(steps):
            prediction = torch.func.functional_call(module, {**theta, "context": phi}, (support_x,))
            (g,) = torch.autograd.grad(loss(prediction, support_y), phi, create_graph=True)
            phi = phi - lr * (g if second_order else g.detach())
        prediction = torch.func.functional_call(module, {**theta, "context": phi}, (query_x,))
        total = total + loss(prediction, query_y) / episodes.tasks
    grads = torch.autograd.grad(total, list(theta.values()))
    return dict(zip(theta, grads, strict=True))


@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_meta_gradient_equals_cavia(case: str, second_order: bool) -> None:
    make, draw, loss = CASES[case]
    module, episodes = make().double(), draw()
    expected = cavia(module, episodes, loss, lr=0.7, steps=2, second_order=second_order)
    forward, theta = functionalize(module)
    theta["context"] = torch.randn_like(theta["context"])  # no task starts from it
    inner = InnerLoop(0.7, 2, second_order=second_order, adapted_params=CONTEXT, initializer=ZeroContext(CONTEXT))
    for engine in ENGINES:
        other = dataclasses.replace(inner, engine=engine, task_chunk=2)
        got = meta_gradient(forward, theta, episodes, other, loss=loss).grads
        assert not got["context"].any(), engine
        assert relative_error({name: got[name] for name in expected}, expected) < 1e-9, engine


def test_second_order_term_of_cavia_is_not_zero() -> None:
    module, episodes = ContextMLP(2, 1, hidden=(7, 6), context=4).double(), curves()
    second, first = (cavia(module, episodes, mse_loss, lr=0.7, steps=2, second_order=order) for order in (True, False))
    assert relative_error(first, second) > 1e-2


@pytest.mark.parametrize("case", CASES)
def test_only_the_context_is_adapted(case: str) -> None:
    make, draw, loss = CASES[case]
    forward, theta = functionalize(make().double())
    episodes = draw()
    inner = InnerLoop(0.7, 2, adapted_params=CONTEXT, initializer=ZeroContext(CONTEXT))
    fast = adapt(forward, theta, episodes.support_x, episodes.support_y, inner, loss=loss)
    assert {name for name, p in theta.items() if not torch.equal(fast[name], p.expand_as(fast[name]))} == CONTEXT
    x = episodes.query_x[0]
    before, after = (forward({**theta, "context": phi}, x) for phi in (theta["context"], fast["context"][0]))
    assert (before - after).abs().max() > 1e-3


def test_context_mlp_equals_the_papers() -> None:
    """Check the number of parameters: 2 hidden layers of 40, and phi as further inputs."""
    module = ContextMLP(1, 1)
    widths = [1 + 5, 40, 40, 1]
    linear = sum((a + 1) * b for a, b in pairwise(widths))
    assert sum(p.numel() for p in module.parameters()) == linear + 5
    assert module(torch.zeros(7, 1)).shape == (7, 1)
    x, phi = torch.randn(7, 1), torch.randn(5)
    with torch.no_grad():
        module.context.copy_(phi)
    torch.testing.assert_close(module(x), module.layers(torch.cat([x, phi.repeat(7, 1)], dim=1)))


@pytest.mark.parametrize("pool", ["stride", "max"])
def test_context_conv4_starts_as_conv4(pool: str) -> None:
    module, plain = ContextConv4(5, width=8, pool=pool), Conv4(5, width=8, pool=pool)
    plain.load_state_dict({n: p for n, p in module.state_dict().items() if not n.startswith(("context", "film"))})
    x = torch.rand(6, 1, 28, 28)
    torch.testing.assert_close(module(x), plain(x))
    assert module.film.weight.shape == (16, 100)


def film_by_hand(module: ContextConv4, x: Tensor) -> Tensor:
    """Compute in the order of the authors' code: convolution, BatchNorm, pool, FiLM, ReLU."""
    scale, shift = module.film(module.context)[:4], module.film(module.context)[4:]
    for number, block in enumerate(module.features):
        x = max_pool2d(block.get_submodule("1")(block.get_submodule("0")(x)), 2)
        if number == 2:
            x = scale.view(1, -1, 1, 1) * x + shift.view(1, -1, 1, 1)
        x = relu(x)
    return module.head(x.mean(dim=(-2, -1)))


def test_context_conv4_scales_and_shifts_the_third_block() -> None:
    module = ContextConv4(5, width=4).double()
    with torch.no_grad():
        wanted = torch.tensor([-2.0, -1.0, 1.0, 2.0, 0.5, 0.5, -0.5, -0.5]).double() - module.film.bias
        module.context.copy_(torch.linalg.pinv(module.film.weight) @ wanted)
    assert (module.film(module.context)[:2] < 0).all(), "pooling before FiLM differs from pooling after it"
    x = torch.rand(6, 1, 28, 28, dtype=torch.float64)
    torch.testing.assert_close(module(x), film_by_hand(module, x))


def test_context_of_a_submodule_is_found() -> None:
    assert module_parts(nn.Sequential(nn.Identity(), ContextConv4(3))).context_params == {"1.context"}
