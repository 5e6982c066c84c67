"""iMAML against closed forms and dense solves, in float64."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from metalearn import Episodes, Forward, InnerLoop, Params, functionalize
from metalearn.core.errors import NonFiniteLossError
from metalearn.core.params import grad_of, relative_error
from metalearn.core.profiling.memory import PeakTensorMemory
from metalearn.derivatives import hessian
from metalearn.inner import MetaCurvature, adapt, task_losses
from metalearn.metagrad.implicit import Implicit, conjugate_gradients
from metalearn.metagrad.task_chunks import mean_over_passes
from metalearn.models import MLP
from tests.metagrad.settings import HEAD, small_mlp, vectors


def regression(*, tasks: int = 3) -> Episodes:
    def numbers(*shape: int) -> Tensor:
        return torch.randn(tasks, *shape, dtype=torch.float64)

    return Episodes(numbers(6, 3), numbers(6, 1), numbers(5, 3), numbers(5, 1))


def loss_at_solution(
    theta: Params, episodes: Episodes, rho: float, *, decay: float = 0.0, scale: float = 1.0
) -> Tensor:
    """Return the query loss at argmin_w |X w + c - y|^2 / S + decay/2 |w|^2 + rho/2 |w - scale theta|^2, c constant.

    The gradient in w is 0 where (2 X'X / S + decay + rho) w = 2 X'(y - c) / S + rho scale theta; differentiable.
    """
    losses = []
    for x, y, query_x, query_y in zip(*vars(episodes).values(), strict=True):
        c = theta.get("bias", torch.zeros(1, dtype=torch.float64))
        a = 2 * x.T @ x / len(x) + (decay + rho) * torch.eye(3, dtype=torch.float64)
        w = torch.linalg.solve(a, 2 * x.T @ (y - c) / len(x) + rho * scale * theta["weight"].T)
        losses.append(((query_x @ w + c - query_y) ** 2).mean())
    return torch.stack(losses).mean()


def twice(forward: Forward, fast: Params, support_x: Tensor, support_y: Tensor) -> Params:
    return {name: 2 * w for name, w in fast.items()}


CASES: dict[str, tuple[bool, dict[str, Any], dict[str, float]]] = {
    "plain": (False, {}, {}),
    "weight decay": (False, {"weight_decay": 0.5}, {"decay": 0.5}),
    "adapted weight, constant bias": (True, {"adapted_params": {"weight"}}, {}),
    "initializer": (False, {"initializer": twice}, {"scale": 2.0}),
}


@pytest.mark.parametrize("case", CASES)
def test_quadratic_equals_closed_form(case: str) -> None:
    bias, settings, closed = CASES[case]
    forward, theta = functionalize(nn.Linear(3, 1, bias=bias).double())
    episodes, inner = regression(), InnerLoop(0.1, 100, proximal_weight=3.0, **settings)
    got = Implicit(cg_steps=3, cg_tolerance=0.0)(forward, theta, episodes, inner, mse_loss)
    at = {name: p.clone().requires_grad_() for name, p in theta.items()}
    loss = loss_at_solution(at, episodes, 3.0, **closed)
    assert got.loss.item() == pytest.approx(loss.item(), rel=1e-8), "the inner problem is solved"
    assert relative_error(got.grads, grad_of(loss, at, create_graph=False)) < 1e-8
    assert got.diagnostics["cg_residual"] < 1e-12, "3 iterations solve 3 equations"


def flat(grads: Params) -> Tensor:
    return torch.cat([g.flatten() for g in grads.values()])


def system_of_task(
    forward: Forward, phi: Params, episodes: Episodes, t: int, rho: float, damping: float
) -> tuple[Tensor, Tensor]:
    """Return dense A = (1 + damping) I + H/rho and b = dL_query(phi) of one task, in the order of the parameters."""
    own = {name: w[t] for name, w in phi.items()}
    blocks = hessian(lambda p: cross_entropy(forward(p, episodes.support_x[t]), episodes.support_y[t]), own)
    rows = [torch.cat([blocks[i][j].reshape(own[i].numel(), -1) for j in own], dim=1) for i in own]
    at = {name: w.clone().requires_grad_() for name, w in own.items()}
    b = grad_of(cross_entropy(forward(at, episodes.query_x[t]), episodes.query_y[t]), at, create_graph=False)
    h = torch.cat(rows)
    return (1 + damping) * torch.eye(len(h), dtype=h.dtype) + h / rho, flat(b)


@pytest.mark.parametrize("damping", [0.0, 0.7])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_equals_dense_solve_away_from_minimum(batch_norm: bool, damping: float) -> None:
    """After 2 steps, far from a minimum: each task's own matrix, all of them positive definite."""
    forward, theta = functionalize(MLP(4, 3, hidden=(3,), batch_norm=batch_norm).double())
    episodes, inner = vectors(), InnerLoop(0.2, 2, proximal_weight=4.0)
    phi = adapt(forward, theta, episodes.support_x, episodes.support_y, inner)
    expected = torch.zeros(sum(p.numel() for p in theta.values()), dtype=torch.float64)
    for t in range(episodes.tasks):
        a, b = system_of_task(forward, phi, episodes, t, 4.0, damping)
        assert torch.linalg.eigvalsh(a)[0] > 0
        expected += torch.linalg.solve(a, b) / episodes.tasks
    got = Implicit(cg_steps=40, cg_tolerance=1e-13, damping=damping)(forward, theta, episodes, inner, cross_entropy)
    assert relative_error({"all": flat(got.grads)}, {"all": expected}) < 1e-10
    assert got.diagnostics["cg_residual_max"] < 1e-12


def test_cg_residual_equals_dense_residual() -> None:
    forward, theta = functionalize(MLP(4, 3, hidden=(3,)).double())
    episodes, inner = vectors(tasks=4), InnerLoop(0.2, 2, proximal_weight=0.5, task_chunk=3)
    engine = Implicit(cg_steps=2)
    phi = adapt(forward, theta, episodes.support_x, episodes.support_y, inner)
    expected = []
    for t, task in enumerate(episodes.split(1)):
        x = flat(engine(forward, theta, task, inner, cross_entropy).grads)
        a, b = system_of_task(forward, phi, episodes, t, 0.5, 0.0)
        expected.append(torch.linalg.vector_norm(b - a @ x) / torch.linalg.vector_norm(b))
    residuals = torch.stack(expected)
    assert residuals.min() > 1e-4, "it was stopped early"
    whole = engine(forward, theta, episodes, inner, cross_entropy)
    chunked = mean_over_passes(
        lambda tasks: engine(forward, theta, tasks, inner, cross_entropy), theta, [episodes], [3]
    )
    for result in (whole, chunked):
        torch.testing.assert_close(result.diagnostics["cg_residual"], residuals.mean())
        torch.testing.assert_close(result.diagnostics["cg_residual_max"], residuals.max())
        assert not result.diagnostics["cg_residual"].requires_grad


def test_first_order_drops_the_hessian() -> None:
    forward, theta = functionalize(MLP(4, 3, hidden=(3,)).double())
    episodes, inner = vectors(), InnerLoop(0.2, 3, proximal_weight=1.0, second_order=False, adapted_params=HEAD)
    fast = adapt(forward, theta, episodes.support_x, episodes.support_y, inner)
    at = {name: w.requires_grad_() for name, w in fast.items()}
    losses = task_losses(forward, at, episodes.query_x, episodes.query_y, loss=cross_entropy).losses
    expected = {name: g.sum(dim=0) for name, g in grad_of(losses.mean(), at, create_graph=False).items()}
    got = Implicit()(forward, theta, episodes, inner, cross_entropy)
    assert relative_error(got.grads, expected) < 1e-12
    assert got.diagnostics["cg_residual"] == pytest.approx(0.0)


def test_memory_does_not_grow_with_the_steps() -> None:
    forward, theta = functionalize(MLP(4, 3, hidden=(16,)).double())
    peaks = []
    for steps in (2, 2, 12):  # the first call loads what torch loads once
        with PeakTensorMemory() as live:
            Implicit(cg_steps=2)(forward, theta, vectors(), InnerLoop(0.2, steps, proximal_weight=2.0), cross_entropy)
        peaks.append(live.peak)
    snapshot = 3 * sum(p.numel() * p.element_size() for p in theta.values())
    assert peaks[2] < peaks[1] + snapshot, "10 more steps, and not one more copy of the fast weights"


def test_negative_curvature_stops_only_its_task() -> None:
    """A = diag(3, -1), b = (1, 1): alpha = 2/2, x = (1, 1), r = (-2, 2), beta = 8/2, d = (2, 6), d.Ad = 12 - 36 < 0."""
    diagonals = torch.tensor([[3.0, -1.0], [3.0, 1.0], [-3.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    b = torch.ones_like(diagonals)
    b[3] = 0.0  # nothing to solve
    x, residuals = conjugate_gradients(lambda v: {"w": diagonals * v["w"]}, {"w": b}, steps=9, tolerance=1e-12)
    torch.testing.assert_close(x["w"], torch.tensor([[1, 1], [1 / 3, 1], [1, 1], [0, 0]], dtype=torch.float64))
    # b - A x = (-2, 2), (0, 0), (4, 0) and (0, 0), against |b| = sqrt 2
    expected = torch.tensor([2.0, 0.0, 4 / 2**0.5, 0.0], dtype=torch.float64)
    torch.testing.assert_close(residuals, expected, atol=1e-12, rtol=1e-12)


def test_conjugate_gradients_stop_for_each_task_and_for_all() -> None:
    products = 0
    diagonals = torch.tensor([[1.0, 1.0, 1.0], [1.0, 2.0, 9.0]], dtype=torch.float64)

    def product(v: Params) -> Params:
        nonlocal products
        products += 1
        return {"w": diagonals * v["w"], "scalar": 2 * v["scalar"]}

    b = {"w": torch.ones_like(diagonals), "scalar": torch.ones(2, dtype=torch.float64)}
    x, residuals = conjugate_gradients(product, b, steps=50, tolerance=1e-10)
    torch.testing.assert_close(x["w"], 1 / diagonals)
    torch.testing.assert_close(x["scalar"], torch.full((2,), 0.5, dtype=torch.float64))
    assert residuals.max() < 1e-10
    assert products == 3, "as many as the second task's matrix has eigenvalues"


@pytest.mark.parametrize("of", ["matrix", "right-hand side"])
def test_nan_passes_on_to_the_solution(of: str) -> None:
    a, b = torch.ones(2, 3), torch.ones(2, 3)
    (a if of == "matrix" else b)[1] = torch.nan
    x, residuals = conjugate_gradients(lambda v: {"w": a * v["w"]}, {"w": b}, steps=5, tolerance=0.0)
    assert x["w"][0].isfinite().all()
    assert x["w"][1].isnan().all()
    assert residuals[1].isnan()
    alone, _ = conjugate_gradients(lambda v: {"w": a[1:] * v["w"]}, {"w": b[1:]}, steps=5, tolerance=0.0)
    assert alone["w"].isnan().all()


def test_dropout_mask_is_the_same_for_all_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise every product would use another matrix."""
    products: list[Params] = []

    def twice_the_same(product: Callable[[Params], Params], b: Params, **numbers: Any) -> tuple[Params, Tensor]:
        products.extend((product(b), product(b)))
        return conjugate_gradients(product, b, **numbers)

    monkeypatch.setattr(sys.modules["metalearn.metagrad.implicit"], "conjugate_gradients", twice_the_same)
    module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    forward, theta = functionalize(module)
    Implicit()(forward, theta, vectors(), InnerLoop(0.2, 2, proximal_weight=2.0), cross_entropy)
    assert all(torch.equal(w, products[1][name]) for name, w in products[0].items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"proximal_weight": 0.0}, r"inner\.proximal_weight is 0, .*Give inner\.proximal_weight a positive number"),
        ({"learned_lr": "layer"}, r"inner\.learned_lr='layer', which iMAML has no gradient for"),
        ({"transform": MetaCurvature()}, r"inner\.transform=.* has no gradient for"),
        ({"query_weights": (0.0, 0.5, 0.5)}, r"inner\.query_weights=.* has no gradient for"),
        ({"per_step_params": {"layers.2.weight"}}, r"inner\.per_step_params=.* has no gradient for"),
    ],
)
def test_unsupported_setting_raises(settings: dict[str, Any], message: str) -> None:
    forward, theta = small_mlp()
    with pytest.raises(ValueError, match=message):
        Implicit()(forward, theta, vectors(), InnerLoop(0.2, 2, **{"proximal_weight": 1.0, **settings}), cross_entropy)


@pytest.mark.parametrize(
    ("name", "value"), [("cg_steps", 0), ("cg_steps", 2.5), ("cg_tolerance", -1.0), ("damping", -0.1)]
)
def test_number_out_of_range_raises(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"Implicit: {name}={value}; it must be"):
        Implicit(**{name: value})


def test_nonfinite_loss_raises() -> None:
    forward, theta = functionalize(nn.Linear(4, 3).double())
    episodes = vectors()
    episodes.support_x[2] = torch.nan
    with pytest.raises(NonFiniteLossError, match="task 2"):
        Implicit()(forward, theta, episodes, InnerLoop(0.2, 2, proximal_weight=1.0), cross_entropy)
