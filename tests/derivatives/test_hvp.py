"""Products with second-derivative matrices against closed forms, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metalearn import Params, derivatives
from metalearn.core.errors import NonFiniteGradientError
from metalearn.derivatives import (
    HVP_MODES,
    gauss_newton_vp,
    gradient,
    hessian,
    hvp,
    nth_derivative,
    top_eigenvalues,
)

DOUBLE = torch.float64


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=DOUBLE)


@pytest.mark.parametrize("mode", HVP_MODES)
def test_known_product(mode: str) -> None:
    # f = w1^2 sin w2 at (1, pi/2): gradient (2 w1 sin w2, w1^2 cos w2) = (2, 0),
    # Hessian [[2 sin w2, 2 w1 cos w2], [., -w1^2 sin w2]] = diag(2, -1), times (0.5, 1) = (1, -1).
    x, v = tensor(1.0, math.pi / 2), tensor(0.5, 1.0)

    def f(w: Tensor) -> Tensor:
        return w[0] ** 2 * torch.sin(w[1])

    torch.testing.assert_close(gradient(f, x), tensor(2.0, 0.0), rtol=0, atol=1e-15)
    torch.testing.assert_close(hvp(f, x, v, mode=mode), tensor(1.0, -1.0), rtol=0, atol=1e-15)


@pytest.mark.parametrize("mode", HVP_MODES)
def test_dictionaries_of_any_shapes(mode: str) -> None:
    # f = sum(a)^2 / 2 * b has H_aa = b 11', H_ab = sum(a) 1, H_bb = 0.
    x = {"a": torch.randn(2, 3, dtype=DOUBLE), "b": torch.tensor(1.5, dtype=DOUBLE)}
    v = {"a": torch.randn(2, 3, dtype=DOUBLE), "b": torch.tensor(-0.5, dtype=DOUBLE)}
    got = hvp(lambda p: p["a"].sum() ** 2 / 2 * p["b"], x, v, mode=mode)
    total, moved = x["a"].sum(), v["a"].sum()
    torch.testing.assert_close(got["a"], (x["b"] * moved + total * v["b"]).expand(2, 3))
    torch.testing.assert_close(got["b"], total * moved)


@pytest.mark.parametrize("mode", HVP_MODES)
def test_order_of_a_dictionary_does_not_matter(mode: str) -> None:
    x, v = {"a": tensor(1.0), "b": tensor(2.0)}, {"b": tensor(0.0), "a": tensor(1.0)}
    got = hvp(lambda p: (p["a"] ** 3).sum() + (p["b"] ** 2).sum(), x, v, mode=mode)  # H = diag(6, 2)
    assert (got["a"].item(), got["b"].item()) == (6.0, 0.0)


def stopped(x: Tensor) -> Tensor:
    with torch.no_grad():
        total = x.sum()
    return x.pow(2).sum() * total


def test_no_grad_stops_reverse_mode_and_is_refused_by_forward_mode() -> None:
    # With the sum a constant s = 3 the Hessian is 2 s I.
    x, v = tensor(1.0, 2.0), tensor(1.0, 0.0)
    torch.testing.assert_close(hvp(stopped, x, v, mode="reverse_over_reverse"), tensor(6.0, 0.0))
    for mode in ("forward_over_reverse", "reverse_over_forward"):
        with pytest.raises(NotImplementedError, match=r"does not stop at torch\.no_grad\(\).*\.detach\(\)"):
            hvp(stopped, x, v, mode=mode)


@pytest.mark.parametrize("mode", HVP_MODES)
def test_fused_attention_is_computed_by_its_formula(mode: str) -> None:
    q, v = torch.randn(1, 2, 3, 4, dtype=DOUBLE), torch.randn(1, 2, 3, 4, dtype=DOUBLE)

    def fused(q: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, q, q).pow(2).sum()

    def plain(q: Tensor) -> Tensor:
        return ((q @ q.transpose(-1, -2) / 2).softmax(dim=-1) @ q).pow(2).sum()

    torch.testing.assert_close(hvp(fused, q, v, mode=mode), hvp(plain, q, v, mode=mode))


def test_a_missing_formula_names_the_mode_that_needs_none() -> None:
    x, v = torch.randn(2, 6, dtype=DOUBLE), torch.randn(2, 6, dtype=DOUBLE)

    def f(x: Tensor) -> Tensor:
        return torch.nn.functional.huber_loss(x, 2 * x.detach())

    assert hvp(f, x, v, mode="reverse_over_reverse").shape == (2, 6)
    with pytest.raises(NotImplementedError, match=r"huber_loss.*mode='reverse_over_reverse', which does not"):
        hvp(f, x, v)


@pytest.mark.parametrize("mode", HVP_MODES)
def test_inference_mode_is_refused(mode: str) -> None:
    x = tensor(1.0, 2.0)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"no gradients inside torch\.inference_mode"):
        hvp(lambda x: x.pow(3).sum(), x, x, mode=mode)


@pytest.mark.parametrize("mode", HVP_MODES)
def test_expanded_point_and_direction(mode: str) -> None:
    x, v = tensor(2.0).expand(3), tensor(1.0).expand(3)
    torch.testing.assert_close(hvp(lambda x: x.pow(3).sum(), x, v, mode=mode), tensor(12.0, 12.0, 12.0))


@pytest.mark.parametrize("mode", HVP_MODES)
@pytest.mark.parametrize(
    "f",
    [lambda x: 3 * x.sum(), lambda x: torch.zeros((), dtype=DOUBLE), lambda x: (x.detach() ** 2).sum()],
    ids=["linear", "constant", "detached"],
)
def test_zeros_where_there_is_no_curvature(f: Any, mode: str) -> None:
    assert hvp(f, tensor(1.0, 2.0), tensor(1.0, 1.0), mode=mode).eq(0).all()


@pytest.mark.parametrize("mode", HVP_MODES)
def test_point_is_neither_changed_nor_marked(mode: str) -> None:
    x, v = tensor(1.0, 2.0), tensor(1.0, 1.0)
    with torch.no_grad():
        hvp(lambda x: x.pow(4).sum(), x, v, mode=mode)
    assert torch.equal(x, tensor(1.0, 2.0))
    assert not x.requires_grad
    assert x.grad is None


@pytest.mark.parametrize("mode", HVP_MODES)
def test_bad_input(mode: str) -> None:
    x = tensor(1.0, 2.0)
    with pytest.raises(ValueError, match=r"f gave shape \(2,\) and must give a scalar.*\.sum\(\) or \.mean\(\)"):
        hvp(lambda x: 2 * x, x, x, mode=mode)
    with pytest.raises(ValueError, match=r"f gave torch\.complex128 and must give a real number"):
        hvp(lambda x: (x * 1j).sum(), x, x, mode=mode)
    with pytest.raises(TypeError, match=r"x is torch\.int64: only floating-point tensors have derivatives"):
        hvp(lambda x: x.sum(), torch.tensor([1, 2]), x, mode=mode)
    with pytest.raises(TypeError, match=r"x\['n'\] is torch\.int64"):
        hvp(lambda p: p["n"].sum(), {"n": torch.tensor(1)}, {"n": torch.tensor(1.0)}, mode=mode)
    with pytest.raises(ValueError, match=r"v must be shaped like x, \(2,\), and is \(3,\)"):
        hvp(lambda x: x.sum(), x, tensor(1.0, 1.0, 1.0), mode=mode)
    with pytest.raises(ValueError, match=r"x is an empty dictionary"):
        hvp(lambda p: torch.zeros(()), {}, {}, mode=mode)
    with pytest.raises(TypeError, match=r"x is list; give a Tensor or a dictionary"):
        hvp(lambda x: x.sum(), [1.0], x, mode=mode)  # type: ignore[type-var]


def test_unknown_mode_is_named() -> None:
    with pytest.raises(ValueError, match=r"mode='forward' is not one of forward_over_reverse, reverse_over_rev"):
        hvp(lambda x: x.sum(), tensor(1.0), tensor(1.0), mode="forward")


def test_activations_are_freed_as_the_reverse_pass_comes_to_them() -> None:
    # 20 layers of sin keep 20 activations; the pull-back must not hold all of them, and their duals, to its end.
    held = []

    def f(x: Tensor) -> Tensor:
        for _ in range(20):
            x = torch.sin(x)
        return x.sum()

    from metalearn.core.profiling.memory import PeakTensorMemory

    x = torch.randn(1000, dtype=DOUBLE)
    for product in (
        lambda: hvp(f, x, torch.ones_like(x)),
        lambda: torch.func.jvp(torch.func.grad(f), (x,), (torch.ones_like(x),)),
    ):
        with PeakTensorMemory() as live:
            product()
        held.append(live.peak)
    assert held[0] < 0.6 * held[1]


def test_gauss_newton_of_least_squares_lacks_the_models_curvature() -> None:
    # z = (x1^2, x1 x2), L = |z|^2 / 2: J = [[2 x1, 0], [x2, x1]], d2L/dz2 = I, so G = J'J; the Hessian adds z_i d2 z_i.
    x, v = tensor(1.5, -0.5), tensor(0.3, 0.7)

    def model(x: Tensor) -> Tensor:
        return torch.stack([x[0] ** 2, x[0] * x[1]])

    def loss(z: Tensor) -> Tensor:
        return z.pow(2).sum() / 2

    jacobian = torch.tensor([[3.0, 0.0], [-0.5, 1.5]], dtype=DOUBLE)
    torch.testing.assert_close(gauss_newton_vp(model, loss, x, v), jacobian.T @ jacobian @ v)
    full = jacobian.T @ jacobian + torch.tensor([[2 * 2.25, -0.75], [-0.75, 0.0]], dtype=DOUBLE)
    torch.testing.assert_close(hessian(lambda x: loss(model(x)), x), full)


def test_gauss_newton_of_a_linear_model_is_the_hessian() -> None:
    a = torch.randn(5, 3, dtype=DOUBLE)
    x, v = torch.randn(3, dtype=DOUBLE), torch.randn(3, dtype=DOUBLE)
    got = gauss_newton_vp(lambda x: a @ x, lambda z: torch.logsumexp(z, dim=0), x, v)
    torch.testing.assert_close(got, hvp(lambda x: torch.logsumexp(a @ x, dim=0), x, v))


def test_module_is_offered_at_the_top() -> None:
    assert derivatives.hvp is hvp


def test_complex_points_are_told_to_be_real_pairs() -> None:
    z = torch.ones(2, dtype=torch.complex128)
    with pytest.raises(TypeError, match=r"x is torch\.complex128.*view_as_real\(x\).*view_as_complex") as caught:
        hvp(lambda z: (z * z.conj()).real.sum(), z, z)
    assert ".float()" not in str(caught.value)


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
def test_what_a_formula_keeps_of_the_forward_pass_has_a_tangent(name: str) -> None:
    w, v = torch.randn(3, 3, dtype=DOUBLE), torch.randn(3, 3, dtype=DOUBLE)

    def f(w: Tensor) -> Tensor:
        return FACTORED[name](w @ w.T + EYE)

    torch.testing.assert_close(hvp(f, w, v), hvp(f, w, v, mode="reverse_over_reverse"))
    eigenvalues = torch.linalg.eigvalsh(hessian(f, w).reshape(9, 9))
    torch.testing.assert_close(top_eigenvalues(f, w)[0], eigenvalues.max())


NORMALISATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "layer_norm": lambda x: torch.nn.functional.layer_norm(x, (6,)),
    "batch_norm": lambda x: torch.nn.functional.batch_norm(x, None, None, training=True),
    "instance_norm": lambda x: torch.nn.functional.instance_norm(x[None]),
}


@pytest.mark.parametrize("name", NORMALISATIONS)
def test_normalisation_is_refused_by_name_where_a_forward_formula_is_differentiated(name: str) -> None:
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
    "mean": lambda p: torch.nn.functional.mse_loss(p, RIGHT),
    "module": lambda p: torch.nn.MSELoss()(p, RIGHT),
    "target": lambda p: torch.nn.functional.mse_loss(RIGHT, p),
    "both": lambda p: torch.nn.functional.mse_loss(p, p.tanh()),
    "partly constant": lambda p: torch.nn.functional.mse_loss(torch.cat([p[:1].detach(), p[1:]]), RIGHT),
    "sum": lambda p: torch.nn.functional.mse_loss(p, RIGHT, reduction="sum"),
    "root": lambda p: torch.nn.functional.mse_loss(p, RIGHT).sqrt(),
}


@pytest.mark.parametrize("mode", HVP_MODES)
@pytest.mark.parametrize("name", MEANS)
def test_mean_squared_error_is_right_in_every_mode(name: str, mode: str) -> None:
    f, x, v = MEANS[name], torch.randn(3, 2, dtype=DOUBLE), torch.randn(3, 2, dtype=DOUBLE)
    h = 1e-6
    slope = (gradient(f, x + h * v) - gradient(f, x - h * v)) / (2 * h)
    torch.testing.assert_close(hvp(f, x, v, mode=mode), slope, rtol=1e-6, atol=1e-8)
    assert torch.isfinite(top_eigenvalues(f, x, mode=mode)).all()


@pytest.mark.parametrize("mode", HVP_MODES)
def test_a_state_dict_and_a_parameter_dict_are_points(mode: str) -> None:
    module, x, y = nn.Linear(3, 2), torch.randn(5, 3), torch.randint(2, (5,))

    def f(params: Params) -> Tensor:
        return torch.nn.functional.cross_entropy(torch.func.functional_call(module, params, (x,)), y)

    theta = module.state_dict()
    v = type(theta)((name, torch.randn_like(p)) for name, p in theta.items())
    want = hvp(f, dict(theta), dict(v))
    for point in (theta, nn.ParameterDict(theta)):
        got = hvp(f, point, v, mode=mode)  # type: ignore[type-var]
        assert list(got) == list(want)
        for name, product in want.items():
            torch.testing.assert_close(got[name], product)


@pytest.mark.parametrize("mode", HVP_MODES)
def test_batch_norm_with_running_statistics_is_refused_and_left_as_it_was(mode: str) -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    before = {name: t.clone() for name, t in module.state_dict().items()}
    theta = {name: p.detach() for name, p in module.named_parameters()}
    x = torch.randn(5, 3)
    with pytest.raises(ValueError, match=r"track_running_stats=False.*model\.eval\(\)"):
        hvp(lambda p: torch.func.functional_call(module, p, (x,)).square().mean(), theta, theta, mode=mode)
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())


def test_gauss_newton_takes_losses_without_a_forward_formula() -> None:
    x, v, z = torch.randn(2, 3, dtype=DOUBLE), torch.randn(2, 3, dtype=DOUBLE), torch.randn(2, 3, dtype=DOUBLE)

    def loss(p: Tensor) -> Tensor:
        return torch.nn.functional.huber_loss(p, z)

    torch.testing.assert_close(
        gauss_newton_vp(lambda x: 2 * x, loss, x, v), 4 * hvp(loss, 2 * x, v, mode="reverse_over_reverse")
    )
    with pytest.raises(NotImplementedError, match=r"gauss_newton_vp.*of a model and a loss"):
        gauss_newton_vp(lambda x: torch.cdist(x, z), torch.sum, x, v)


ZERO, AT_ZERO = torch.zeros(3, dtype=DOUBLE), torch.tensor([1.0, 2.0, -1.0], dtype=DOUBLE)
SMOOTH: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "norm": (lambda x: x.norm() ** 2, 2.0),
    "vector_norm": (lambda x: torch.linalg.vector_norm(x) ** 2, 2.0),
    "dist": (lambda x: torch.dist(x, ZERO) ** 2, 2.0),
    "rbf": (lambda x: torch.exp(-(torch.linalg.norm(x) ** 2)), -2.0),
    "sqrt": (lambda x: (x * x).sum().sqrt() ** 2, 2.0),
    "pairwise": (lambda x: torch.nn.functional.pairwise_distance(x[None], ZERO[None], eps=0).pow(2).sum(), 2.0),
}
KINKED: dict[str, Callable[[Tensor], Tensor]] = {
    "norm": torch.norm,
    "power 1.5": lambda x: x.norm() ** 1.5,
    "norm of 1.5, squared": lambda x: x.norm(1.5) ** 2,
    "sqrt of abs": lambda x: (x.abs().sqrt()).sum(),
    "sqrt": lambda x: (x * x).sum().sqrt(),
}


@pytest.mark.parametrize("mode", HVP_MODES)
@pytest.mark.parametrize("name", SMOOTH)
def test_a_smooth_function_by_a_formula_that_is_not_has_its_limit(name: str, mode: str) -> None:
    f, factor = SMOOTH[name]
    torch.testing.assert_close(hvp(f, ZERO, AT_ZERO, mode=mode), factor * AT_ZERO, rtol=1e-9, atol=0)


@pytest.mark.parametrize("mode", HVP_MODES)
@pytest.mark.parametrize("name", KINKED)
def test_a_function_without_a_second_derivative_is_refused(name: str, mode: str) -> None:
    with pytest.raises(NonFiniteGradientError, match=r"hvp's product is .* in parameter 'x'.*infinite at 0"):
        hvp(KINKED[name], ZERO, AT_ZERO, mode=mode)
    with pytest.raises(NonFiniteGradientError, match=r"in parameter 'w'"):
        hvp(lambda p: KINKED[name](p["w"]), {"w": ZERO}, {"w": AT_ZERO}, mode=mode)


@pytest.mark.parametrize("mode", HVP_MODES)
def test_a_norm_with_a_kink_has_no_curvature(mode: str) -> None:
    for f in (lambda x: x.norm(1), lambda x: torch.linalg.vector_norm(x, 1), lambda x: torch.dist(x, ZERO, 1)):
        assert not hvp(f, ZERO, AT_ZERO, mode=mode).any()
    rows = torch.eye(3, dtype=DOUBLE)  # a dimension is no order
    got = hvp(lambda x: (torch.linalg.vector_norm(x, 2, 1) ** 2).sum(), 0 * rows, rows, mode=mode)
    torch.testing.assert_close(got, 2 * rows)


@pytest.mark.parametrize("mode", HVP_MODES)
def test_the_limit_is_come_to_where_the_direction_has_zeros(mode: str) -> None:
    x = {"a": ZERO, "b": AT_ZERO}

    def f(p: Params) -> Tensor:
        total: Tensor = p["a"].norm() ** 2 + p["b"].norm() ** 2
        return total

    got = hvp(f, x, {"a": ZERO, "b": AT_ZERO}, mode=mode)
    torch.testing.assert_close(got["a"], ZERO, rtol=0, atol=1e-9)
    torch.testing.assert_close(got["b"], 2 * AT_ZERO)
    torch.testing.assert_close(top_eigenvalues(f, x, 2, mode=mode), torch.full((2,), 2.0, dtype=DOUBLE))


def test_a_hessian_that_is_not_finite_is_refused() -> None:
    with pytest.raises(NonFiniteGradientError, match=r"^the Hessian is nan in parameter '[bw]'.*infinite at 0"):
        hessian(lambda p: (p["w"] ** 3).sum() + p["b"].norm() ** 2, {"w": AT_ZERO, "b": ZERO})


@pytest.mark.parametrize("mode", HVP_MODES)
def test_a_direction_of_another_dtype_is_refused(mode: str) -> None:
    with pytest.raises(ValueError, match=r"^v must have the dtype of x, torch\.float64, and has torch\.float32"):
        hvp(lambda x: x.pow(3).sum(), AT_ZERO, AT_ZERO.float(), mode=mode)


@pytest.mark.parametrize("mode", ["forward_over_reverse", "reverse_over_forward"])
def test_data_is_refused_where_a_tangent_would_pass_it(mode: str) -> None:
    with pytest.raises(NotImplementedError, match=r"\.data; use \.detach\(\)"):
        hvp(lambda x: (x * x.data).sum(), AT_ZERO, AT_ZERO, mode=mode)
    assert not hvp(lambda x: (x * x.data).sum(), AT_ZERO, AT_ZERO, mode="reverse_over_reverse").any()


@pytest.mark.parametrize("mode", ["forward_over_reverse", "reverse_over_reverse"])
def test_a_standard_deviation_of_zero(mode: str) -> None:
    x, v = torch.ones(4, dtype=DOUBLE), torch.tensor([1.0, 0.0, 2.0, -1.0], dtype=DOUBLE)
    want = hvp(lambda x: x.var(), x, v)
    for f in (lambda x: x.std() ** 2, lambda x: torch.std_mean(x)[0] ** 2):
        torch.testing.assert_close(hvp(f, x, v, mode=mode), want)


def test_third_derivatives_that_torch_takes_wrongly_are_refused_by_name() -> None:
    x, w = torch.randn(4, 6, dtype=DOUBLE), torch.randn(4, 6, dtype=DOUBLE)

    def normalised(x: Tensor) -> Tensor:
        return (torch.nn.functional.layer_norm(x, (6,)) * w).tanh().sum()

    with pytest.raises(NotImplementedError, match=r"^layer_norm: .*third derivative.*mean and variance"):
        nth_derivative(normalised, x, 3, along=w)

    def product(x: Tensor) -> Tensor:
        return x[0].prod()

    with pytest.raises(NotImplementedError, match=r"^prod: .*mode='reverse'"):
        nth_derivative(product, x, 3, along=w, mode="forward")
    a, v = x[0], w[0]  # d^3 prod(a + t v) / dt^3 = 3! sum over triples of v of the product of the others
    triples = (v[list(c)].prod() * a[[i for i in range(6) if i not in c]].prod() for c in combinations(range(6), 3))
    torch.testing.assert_close(nth_derivative(product, x, 3, along=w), 6 * torch.stack(list(triples)).sum())


def test_hessian_of_a_boolean_selection() -> None:
    x, mask = torch.randn(5, dtype=DOUBLE), torch.tensor([True, False, True, True, False])
    with pytest.raises(NotImplementedError, match=r"^masked_select: .*x\[mask\]"):
        hessian(lambda x: x.masked_select(mask).pow(3).sum(), x)
    got = hessian(lambda x: x[mask].pow(3).sum(), x)
    torch.testing.assert_close(got, torch.diag(6 * x * mask))
