"""Operations that torch differentiates wrongly, each against a formula, finite differences or a plain loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from metalearn import Episodes, InnerLoop, Params, adapt, functionalize, meta_gradient
from metalearn.core.params import relative_error
from metalearn.derivatives import hvp
from metalearn.metagrad.baselines.by_hand import meta_gradient as by_hand

DOUBLE = torch.float64
T, S, Q, N, WORDS = 3, 5, 4, 3, 6


class Words(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(WORDS, 4, **options), nn.Linear(4, N)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.words(x)).mean(dim=1))


def sentences() -> Episodes:
    sizes = (S, Q)
    x = [torch.randint(WORDS, (T, n, 5)) for n in sizes]
    y = [torch.randint(N, (T, n)) for n in sizes]
    return Episodes(x[0], y[0], x[1], y[1])


@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize(
    "options", [{"padding_idx": 0}, {"padding_idx": 2}, {"padding_idx": -1}, {"scale_grad_by_freq": True}]
)
def test_embedding_equals_loop_over_tasks(options: dict[str, Any], second_order: bool, engine: str) -> None:
    module, tasks = Words(**options).double(), sentences()
    inner = InnerLoop(lr=0.3, steps=2, second_order=second_order, engine=engine)
    got = meta_gradient(*functionalize(module), tasks, inner)
    assert relative_error(got.grads, by_hand(module, tasks, inner).grads) < 1e-12


def test_sparse_embedding_equals_dense_one() -> None:
    dense, tasks = Words().double(), sentences()
    sparse = Words(sparse=True).double()
    sparse.load_state_dict(dense.state_dict())
    inner = InnerLoop(lr=0.3, steps=2)
    got = meta_gradient(*functionalize(sparse), tasks, inner)
    assert relative_error(got.grads, by_hand(dense, tasks, inner).grads) < 1e-12


def test_padding_row_is_not_adapted() -> None:
    forward, theta = functionalize(Words(padding_idx=0).double())
    tasks = sentences()
    fast = adapt(forward, theta, tasks.support_x, tasks.support_y, InnerLoop(lr=0.3, steps=2))
    assert torch.equal(fast["words.weight"][:, 0], theta["words.weight"][0].expand(T, 4))


def test_padding_row_has_no_curvature(mode: str) -> None:
    words, weight, v = torch.tensor([[0, 1, 2], [2, 0, 3]]), torch.randn(4, 2, dtype=DOUBLE), torch.ones(4, 2).double()

    def f(w: Tensor, padding: int | None) -> Tensor:
        return functional.embedding(words, w, padding_idx=padding).mean(dim=1).pow(3).sum()

    product = hvp(lambda w: f(w, 0), weight, v, mode=mode)
    blocked = hvp(lambda w: f(torch.cat([w[:1].detach(), w[1:]]), None), weight, v, mode=mode)
    torch.testing.assert_close(product, blocked)


def test_functional_embedding_with_max_norm_raises() -> None:
    def forward(params: Params, x: Tensor) -> Tensor:
        return functional.embedding(x, params["w"], max_norm=1.0).mean(dim=1)

    with pytest.raises(ValueError, match=r"^embedding: max_norm=1\.0 rescales .* without max_norm"):
        meta_gradient(forward, {"w": torch.randn(WORDS, N).double()}, sentences(), InnerLoop(lr=0.1, steps=1))


def slope_of_gradient(f: Callable[[Tensor], Tensor], x: Tensor, v: Tensor, h: float = 1e-5) -> Tensor:
    def gradient(at: Tensor) -> Tensor:
        at = at.detach().requires_grad_()
        return torch.autograd.grad(f(at), at)[0]

    return (gradient(x + h * v) - gradient(x - h * v)) / (2 * h)


def weight_norm(x: Tensor, dim: int, shape: tuple[int, ...]) -> Tensor:
    g = x[4].repeat(2)[: torch.Size(shape).numel()].reshape(shape)
    return torch._weight_norm(x[:4], g, dim).tanh().sum()


SMOOTH: dict[str, Callable[[Tensor], Tensor]] = {
    "weight_norm of rows": lambda x: weight_norm(x, 0, (4, 1)),
    "weight_norm of columns": lambda x: weight_norm(x, 1, (1, 6)),
    "weight_norm of all entries": lambda x: weight_norm(x, -1, ()),
    "hardsigmoid": lambda x: nn.Hardsigmoid()(4 * x).pow(3).sum(),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_second_derivative_equals_differences(name: str, mode: str) -> None:
    f, x, v = SMOOTH[name], torch.randn(5, 6, dtype=DOUBLE), torch.randn(5, 6, dtype=DOUBLE)
    torch.testing.assert_close(hvp(f, x, v, mode=mode), slope_of_gradient(f, x, v), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dim", [0, None])
def test_meta_gradient_of_weight_norm_equals_differences(dim: int | None, engine: str) -> None:
    layer = parametrizations.weight_norm(nn.Linear(4, 5), dim=dim)  # type: ignore[arg-type]  # None: of all entries
    module = nn.Sequential(layer, nn.Tanh(), nn.Linear(5, N)).double()
    forward, theta = functionalize(module)
    x, y = torch.randn(2, 6, 4, dtype=DOUBLE), torch.randint(N, (2, 6))
    tasks, inner = Episodes(x, y, x, y), InnerLoop(lr=0.5, steps=2, engine=engine)
    v = {name: torch.randn_like(p) for name, p in theta.items()}
    grads, h = meta_gradient(forward, theta, tasks, inner).grads, 1e-5
    ahead, behind = (
        meta_gradient(forward, {n: p + s * v[n] for n, p in theta.items()}, tasks, inner).loss for s in (h, -h)
    )
    slope = sum(float((g * v[n]).sum()) for n, g in grads.items())
    assert float(ahead - behind) / (2 * h) == pytest.approx(slope, rel=1e-6)


class ReLU6Sigmoid(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return functional.relu6(x + 3) / 6


def test_mobilenet_meta_gradient_equals_loop(engine: str) -> None:
    from torchvision.models import mobilenet_v3_small
    from torchvision.ops import SqueezeExcitation

    module = mobilenet_v3_small(num_classes=N).double().eval()
    x, y = torch.randn(2, 3, 3, 32, 32, dtype=DOUBLE), torch.randint(N, (2, 3))
    tasks, inner = Episodes(x, y, x, y), InnerLoop(lr=0.01, steps=1, engine=engine)
    got = meta_gradient(*functionalize(module), tasks, inner)
    for block in [m for m in module.modules() if isinstance(m, SqueezeExcitation)]:
        block.scale_activation = ReLU6Sigmoid()
    want = by_hand(module, tasks, inner)
    assert relative_error(got.grads, want.grads) < 1e-6  # of its slope torch's kernel has 8 digits


Z, V = torch.zeros(3, dtype=DOUBLE), torch.tensor([1.0, 2.0, -1.0], dtype=DOUBLE)


def test_sinc_second_derivative_at_and_near_zero(mode: str) -> None:
    torch.testing.assert_close(hvp(lambda x: torch.sinc(x).sum(), Z, V, mode=mode), -(torch.pi**2) / 3 * V)
    for size in (1e-3, 3.1e-3, 3.2e-3, 0.1, 1.3):  # across the seam between series and quotient
        x = torch.full((1,), size, dtype=torch.float64)
        z = torch.pi * x
        exact = torch.pi**2 * ((2 - z * z) * torch.sin(z) - 2 * z * torch.cos(z)) / z**3
        got = hvp(lambda x: torch.sinc(x).sum(), x, torch.ones_like(x), mode=mode)
        torch.testing.assert_close(got, exact, rtol=max(1e-9, 1e-15 / size**3), atol=0)


def test_select_scatter_under_vmap_raises(mode: str) -> None:
    def f(x: Tensor) -> Tensor:
        rows: Tensor = torch.vmap(lambda r: r.select_scatter(r[1] ** 2, 0, 0) ** 2)(x)
        return rows.sum()

    with pytest.raises(NotImplementedError, match=r"^select_scatter: its derivative is wrong under torch\.vmap"):
        hvp(f, torch.randn(2, 3, dtype=DOUBLE), torch.randn(2, 3, dtype=DOUBLE), mode=mode)


@pytest.mark.parametrize("order", ["functional", "torch"])
def test_batch_norm_with_running_statistics_raises(order: str) -> None:
    mean, var = torch.zeros(3, dtype=DOUBLE), torch.ones(3, dtype=DOUBLE)

    def forward(params: Params, x: Tensor) -> Tensor:
        h = x @ params["w"]
        h = h if h.sum() > 1e9 else h * 1  # a branch, so that tasks are taken one after another
        if order == "functional":
            return functional.batch_norm(h, mean, var, training=True)
        return torch.batch_norm(h, None, None, mean, var, True, 0.1, 1e-5, False)

    x, theta = torch.randn(2, 4, 3, dtype=DOUBLE), {"w": torch.randn(3, 3, dtype=DOUBLE)}
    tasks = Episodes(x, torch.zeros(2, 4).long(), x, torch.zeros(2, 4).long())
    with pytest.raises(ValueError, match=r"track_running_stats=False"):
        meta_gradient(forward, theta, tasks, InnerLoop(lr=0.1, steps=1))
    assert not mean.any()


def test_sinc_in_place_and_with_out() -> None:
    x = torch.tensor([0.0, 0.3], dtype=DOUBLE)
    torch.testing.assert_close(
        hvp(lambda x: (x * 1).sinc_().sum(), x, torch.ones_like(x)),
        hvp(lambda x: torch.sinc(x).sum(), x, torch.ones_like(x)),
    )
    with pytest.raises(RuntimeError, match="out="):
        hvp(lambda x: torch.sinc(x, out=torch.empty(2).double()).sum(), x, x, mode="reverse_over_reverse")
