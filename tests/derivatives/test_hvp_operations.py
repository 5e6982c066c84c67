"""Hessian-vector products through single operations, and where a formula is 0/0, in every mode."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from metalearn import Params
from metalearn.core.errors import NonFiniteGradientError
from metalearn.derivatives import gradient, hessian, hvp, nth_derivative, top_eigenvalues

DOUBLE = torch.float64


def huber(x: Tensor) -> Tensor:
    return functional.huber_loss(x, 2 * x.detach())


def test_missing_forward_formula_raises_and_names_another_mode() -> None:
    x, v = torch.randn(2, 6, dtype=DOUBLE), torch.randn(2, 6, dtype=DOUBLE)
    assert hvp(huber, x, v, mode="reverse_over_reverse").shape == (2, 6)
    with pytest.raises(NotImplementedError, match=r"huber_loss.*mode='reverse_over_reverse', which does not"):
        hvp(huber, x, v)


def test_fused_attention_equals_its_formula(mode: str) -> None:
    q, v = torch.randn(1, 2, 3, 4, dtype=DOUBLE), torch.randn(1, 2, 3, 4, dtype=DOUBLE)
    torch.testing.assert_close(
        hvp(lambda q: functional.scaled_dot_product_attention(q, q, q).pow(2).sum(), q, v, mode=mode),
        hvp(lambda q: ((q @ q.mT / 2).softmax(dim=-1) @ q).pow(2).sum(), q, v, mode=mode),
    )


EYE, RIGHT = torch.eye(3, dtype=DOUBLE), torch.randn(3, 2, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
FACTORED: dict[str, Callable[[Tensor], Tensor]] = {
    "solve": lambda a: torch.linalg.solve(a, RIGHT).pow(2).sum(),
    "solve_ex": lambda a: torch.linalg.solve_ex(a, RIGHT)[0].pow(2).sum(),
    "tensorsolve": lambda a: torch.linalg.tensorsolve(a, RIGHT[:, 0]).pow(2).sum(),
    "det": torch.det,
    "logdet": torch.logdet,
    "slogdet": lambda a: torch.linalg.slogdet(a)[1],
    "inv": lambda a: torch.linalg.inv(a).pow(2).sum(),
    "cholesky": lambda a: torch.linalg.cholesky(a).pow(3).sum(),
    "eigh": lambda a: torch.linalg.eigvalsh(a).pow(3).sum(),
    "cumprod with zeros": lambda a: torch.cumprod(a * (torch.arange(3) != 1), dim=1).pow(2).sum(),
}


@pytest.mark.parametrize("name", FACTORED)
def test_formulas_that_save_forward_results_have_tangents(name: str) -> None:
    w, v = torch.randn(3, 3, dtype=DOUBLE), torch.randn(3, 3, dtype=DOUBLE)

    def f(w: Tensor) -> Tensor:
        return FACTORED[name](w @ w.T + EYE)

    torch.testing.assert_close(hvp(f, w, v), hvp(f, w, v, mode="reverse_over_reverse"))
    eigenvalues = torch.linalg.eigvalsh(hessian(f, w).reshape(9, 9))
    torch.testing.assert_close(top_eigenvalues(f, w)[0], eigenvalues.max())


NORMALISATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "layer_norm": lambda x: functional.layer_norm(x, (6,)),
    "batch_norm": lambda x: functional.batch_norm(x, None, None, training=True),
    "instance_norm": lambda x: functional.instance_norm(x[None]),
}


@pytest.mark.parametrize("name", NORMALISATIONS)
def test_normalisation_raises_in_nested_forward_mode(name: str) -> None:
    x, v, w = (torch.randn(4, 6, dtype=DOUBLE) for _ in range(3))

    def f(x: Tensor) -> Tensor:
        return (NORMALISATIONS[name](x) * w).tanh().sum()

    torch.testing.assert_close(hvp(f, x, v), hvp(f, x, v, mode="reverse_over_reverse"))
    with pytest.raises(NotImplementedError, match=rf"^{name}: .*cannot be differentiated.*mode='reverse_over_reverse'"):
        hvp(f, x, v, mode="reverse_over_forward")
    with pytest.raises(NotImplementedError, match=rf"^{name}: .*mode='reverse'"):
        nth_derivative(f, x, 2, along=v, mode="forward")
    first = nth_derivative(f, x, 1, along=v, mode="forward")
    torch.testing.assert_close(first, nth_derivative(f, x, 1, along=v))


MEANS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda p: functional.mse_loss(p, RIGHT),
    "module": lambda p: nn.MSELoss()(p, RIGHT),
    "target": lambda p: functional.mse_loss(RIGHT, p),
    "both": lambda p: functional.mse_loss(p, p.tanh()),
    "partly constant": lambda p: functional.mse_loss(torch.cat([p[:1].detach(), p[1:]]), RIGHT),
    "sum": lambda p: functional.mse_loss(p, RIGHT, reduction="sum"),
    "root": lambda p: functional.mse_loss(p, RIGHT).sqrt(),
}


@pytest.mark.parametrize("name", MEANS)
def test_hvp_of_mean_squared_error_equals_differences(name: str, mode: str) -> None:
    f, x, v = MEANS[name], torch.randn(3, 2, dtype=DOUBLE), torch.randn(3, 2, dtype=DOUBLE)
    h = 1e-6
    slope = (gradient(f, x + h * v) - gradient(f, x - h * v)) / (2 * h)
    torch.testing.assert_close(hvp(f, x, v, mode=mode), slope, rtol=1e-6, atol=1e-8)
    assert torch.isfinite(top_eigenvalues(f, x, mode=mode)).all()


def test_batch_norm_with_running_statistics_raises_unchanged(mode: str) -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    before = {name: t.clone() for name, t in module.state_dict().items()}
    theta = {name: p.detach() for name, p in module.named_parameters()}
    x = torch.randn(5, 3)
    with pytest.raises(ValueError, match=r"track_running_stats=False.*model\.eval\(\)"):
        hvp(lambda p: torch.func.functional_call(module, p, (x,)).square().mean(), theta, theta, mode=mode)
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())


@pytest.mark.parametrize("mode", ["forward_over_reverse", "reverse_over_forward"])
def test_data_attribute_raises_in_forward_mode(mode: str) -> None:
    x = torch.ones(3, dtype=DOUBLE)
    with pytest.raises(NotImplementedError, match=r"\.data; use \.detach\(\)"):
        hvp(lambda x: (x * x.data).sum(), x, x, mode=mode)
    assert not hvp(lambda x: (x * x.data).sum(), x, x, mode="reverse_over_reverse").any()


@pytest.mark.parametrize("mode", ["forward_over_reverse", "reverse_over_reverse"])
def test_hvp_of_squared_standard_deviation_at_zero(mode: str) -> None:
    x, v = torch.ones(4, dtype=DOUBLE), torch.tensor([1.0, 0.0, 2.0, -1.0], dtype=DOUBLE)
    want = hvp(lambda x: x.var(), x, v)
    for f in (lambda x: x.std() ** 2, lambda x: torch.std_mean(x)[0] ** 2):
        torch.testing.assert_close(hvp(f, x, v, mode=mode), want)


ZERO, AT_ZERO = torch.zeros(3, dtype=DOUBLE), torch.tensor([1.0, 2.0, -1.0], dtype=DOUBLE)
SMOOTH: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "norm": (lambda x: x.norm() ** 2, 2.0),
    "vector_norm": (lambda x: torch.linalg.vector_norm(x) ** 2, 2.0),
    "dist": (lambda x: torch.dist(x, ZERO) ** 2, 2.0),
    "rbf": (lambda x: torch.exp(-(torch.linalg.norm(x) ** 2)), -2.0),
    "sqrt": (lambda x: (x * x).sum().sqrt() ** 2, 2.0),
    "pairwise": (lambda x: functional.pairwise_distance(x[None], ZERO[None], eps=0).pow(2).sum(), 2.0),
}
KINKED: dict[str, Callable[[Tensor], Tensor]] = {
    "norm": torch.norm,
    "power 1.5": lambda x: x.norm() ** 1.5,
    "norm of 1.5, squared": lambda x: x.norm(1.5) ** 2,
    "sqrt of abs": lambda x: (x.abs().sqrt()).sum(),
    "sqrt": lambda x: (x * x).sum().sqrt(),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_hvp_at_removable_singularity_is_the_limit(name: str, mode: str) -> None:
    f, factor = SMOOTH[name]
    torch.testing.assert_close(hvp(f, ZERO, AT_ZERO, mode=mode), factor * AT_ZERO, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", KINKED)
def test_hvp_raises_without_second_derivative(name: str, mode: str) -> None:
    with pytest.raises(NonFiniteGradientError, match=r"hvp's product is .* in parameter 'x'.*infinite at 0"):
        hvp(KINKED[name], ZERO, AT_ZERO, mode=mode)
    with pytest.raises(NonFiniteGradientError, match=r"in parameter 'w'"):
        hvp(lambda p: KINKED[name](p["w"]), {"w": ZERO}, {"w": AT_ZERO}, mode=mode)


def test_hvp_of_norm_with_a_kink_is_zero(mode: str) -> None:
    for f in (lambda x: x.norm(1), lambda x: torch.linalg.vector_norm(x, 1), lambda x: torch.dist(x, ZERO, 1)):
        assert not hvp(f, ZERO, AT_ZERO, mode=mode).any()
    rows = torch.eye(3, dtype=DOUBLE)  # a dimension is no order
    got = hvp(lambda x: (torch.linalg.vector_norm(x, 2, 1) ** 2).sum(), 0 * rows, rows, mode=mode)
    torch.testing.assert_close(got, 2 * rows)


def test_hvp_limit_with_zeros_in_the_direction(mode: str) -> None:
    x = {"a": ZERO, "b": AT_ZERO}

    def f(p: Params) -> Tensor:
        return p["a"].norm() ** 2 + p["b"].norm() ** 2

    got = hvp(f, x, {"a": ZERO, "b": AT_ZERO}, mode=mode)
    torch.testing.assert_close(got["a"], ZERO, rtol=0, atol=1e-9)
    torch.testing.assert_close(got["b"], 2 * AT_ZERO)
    torch.testing.assert_close(top_eigenvalues(f, x, 2, mode=mode), torch.full((2,), 2.0, dtype=DOUBLE))


def test_hessian_raises_when_not_finite() -> None:
    with pytest.raises(NonFiniteGradientError, match=r"^the Hessian is nan in parameter '[bw]'.*infinite at 0"):
        hessian(lambda p: (p["w"] ** 3).sum() + p["b"].norm() ** 2, {"w": AT_ZERO, "b": ZERO})
