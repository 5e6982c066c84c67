"""Products with second-derivative matrices against closed forms, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from metalearn import Params, derivatives
from metalearn.core.profiling.memory import PeakTensorMemory
from metalearn.derivatives import gauss_newton_vp, gradient, hessian, hvp

DOUBLE = torch.float64


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=DOUBLE)


PAIR = tensor(1.0, 2.0)
CLOSED_FORMS: dict[str, tuple[Callable[[Any], Tensor], Any, Any, Any]] = {
    # f = w1^2 sin w2 at (1, pi/2): Hessian [[2 sin w2, 2 w1 cos w2], [., -w1^2 sin w2]] = diag(2, -1).
    "plain": (lambda w: w[0] ** 2 * w[1].sin(), tensor(1.0, math.pi / 2), tensor(0.5, 1.0), tensor(1.0, -1.0)),
    "expanded": (lambda x: x.pow(3).sum(), tensor(2.0).expand(3), tensor(1.0).expand(3), tensor(12.0, 12.0, 12.0)),
    "linear": (lambda x: 3 * x.sum(), PAIR, PAIR, 0 * PAIR),
    "constant": (lambda x: torch.zeros((), dtype=DOUBLE), PAIR, PAIR, 0 * PAIR),
    "detached": (lambda x: (x.detach() ** 2).sum(), PAIR, PAIR, 0 * PAIR),
    # f = sum(a)^2 / 2 * b has H_aa = b 11', H_ab = sum(a) 1, H_bb = 0.
    "dictionary, in another order": (
        lambda p: p["a"].sum() ** 2 / 2 * p["b"],
        {"a": tensor(1.0, 2.0, -0.5), "b": tensor(1.5)[0]},
        {"b": tensor(-0.5)[0], "a": tensor(1.0, 0.0, 3.0)},
        {"a": (1.5 * 4 + 2.5 * -0.5) * torch.ones(3, dtype=DOUBLE), "b": tensor(2.5 * 4)[0]},
    ),
}


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_hvp_equals_closed_form_and_changes_nothing(name: str, mode: str) -> None:
    f, x, v, want = CLOSED_FORMS[name]
    before = tree_map(torch.clone, x)
    with torch.no_grad():
        torch.testing.assert_close(hvp(f, x, v, mode=mode), want, rtol=0, atol=1e-15)
    torch.testing.assert_close(x, before, rtol=0, atol=0)
    assert all(leaf.grad is None and not leaf.requires_grad for leaf in tree_leaves(x))


def test_gradient_equals_closed_form() -> None:
    got = gradient(lambda w: w[0] ** 2 * torch.sin(w[1]), tensor(1.0, math.pi / 2))  # (2 w1 sin w2, w1^2 cos w2)
    torch.testing.assert_close(got, tensor(2.0, 0.0), rtol=0, atol=1e-15)


def stopped(x: Tensor) -> Tensor:
    with torch.no_grad():
        total = x.sum()
    return x.pow(2).sum() * total


def test_no_grad_is_constant_in_reverse_mode_and_raises_in_forward_mode() -> None:
    # With the sum a constant s = 3 the Hessian is 2 s I.
    x, v = tensor(1.0, 2.0), tensor(1.0, 0.0)
    torch.testing.assert_close(hvp(stopped, x, v, mode="reverse_over_reverse"), tensor(6.0, 0.0))
    for mode in ("forward_over_reverse", "reverse_over_forward"):
        with pytest.raises(NotImplementedError, match=r"does not stop at torch\.no_grad\(\).*\.detach\(\)"):
            hvp(stopped, x, v, mode=mode)


def test_inference_mode_raises(mode: str) -> None:
    x = tensor(1.0, 2.0)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"no gradients inside torch\.inference_mode"):
        hvp(lambda x: x.pow(3).sum(), x, x, mode=mode)


INTEGERS = torch.tensor([1, 2])
COMPLEX = r"x is torch\.complex128((?!\.float\(\)).)*view_as_real\(x\).*view_as_complex((?!\.float\(\)).)*$"
BAD_INPUTS: list[tuple[Any, Any, Any, type[Exception], str]] = [
    (lambda x: 2 * x, PAIR, PAIR, ValueError, r"f gave shape \(2,\) and must give a scalar.*\.sum\(\) or \.mean\(\)"),
    (lambda x: (x * 1j).sum(), PAIR, PAIR, ValueError, r"f gave torch\.complex128 and must give a real number"),
    (torch.sum, INTEGERS, PAIR, TypeError, r"x is torch\.int64: only floating-point tensors have derivatives"),
    (torch.sum, {"n": INTEGERS}, {"n": PAIR}, TypeError, r"x\['n'\] is torch\.int64"),
    (torch.sum, PAIR, tensor(1.0, 1.0, 1.0), ValueError, r"v must be shaped like x, \(2,\), and is \(3,\)"),
    (torch.sum, {}, {}, ValueError, r"x is an empty dictionary"),
    (torch.sum, [1.0], PAIR, TypeError, r"x is list; give a Tensor or a dictionary"),
    (torch.sum, PAIR, PAIR.float(), ValueError, r"^v must have the dtype of x, torch\.float64, and has torch\.float32"),
    (torch.sum, PAIR + 0j, PAIR + 0j, TypeError, COMPLEX),
]


@pytest.mark.parametrize(
    ("f", "x", "v", "error", "message"), BAD_INPUTS, ids=[message[:20] for *_, message in BAD_INPUTS]
)
def test_hvp_raises_on_bad_input(f: Any, x: Any, v: Any, error: type[Exception], message: str, mode: str) -> None:
    with pytest.raises(error, match=message):
        hvp(f, x, v, mode=mode)
    with pytest.raises(ValueError, match=r"mode='forward' is not one of forward_over_reverse, reverse_over_rev"):
        hvp(torch.sum, PAIR, PAIR, mode="forward")


def test_hvp_frees_activations_during_backward() -> None:
    # 20 layers of sin keep 20 activations; the pull-back must not hold all of them, and their duals, to its end.
    def f(x: Tensor) -> Tensor:
        for _ in range(20):
            x = torch.sin(x)
        return x.sum()

    x = torch.randn(1000, dtype=DOUBLE)
    with PeakTensorMemory() as ours:
        hvp(f, x, torch.ones_like(x))
    with PeakTensorMemory() as plain:
        torch.func.jvp(torch.func.grad(f), (x,), (torch.ones_like(x),))
    assert ours.peak < 0.6 * plain.peak


def test_gauss_newton_of_least_squares_equals_closed_form() -> None:
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


def test_gauss_newton_of_a_linear_model_equals_hessian() -> None:
    a = torch.randn(5, 3, dtype=DOUBLE)
    x, v = torch.randn(3, dtype=DOUBLE), torch.randn(3, dtype=DOUBLE)
    got = gauss_newton_vp(lambda x: a @ x, lambda z: torch.logsumexp(z, dim=0), x, v)
    torch.testing.assert_close(got, hvp(lambda x: torch.logsumexp(a @ x, dim=0), x, v))


def test_derivatives_is_exported() -> None:
    assert derivatives.hvp is hvp
    with pytest.warns(FutureWarning, match="derivatives.free_bytes is called available_memory now"):
        assert derivatives.free_bytes is derivatives.available_memory


def test_hvp_accepts_state_dict_and_parameter_dict(mode: str) -> None:
    module, x, y = nn.Linear(3, 2), torch.randn(5, 3), torch.randint(2, (5,))

    def f(params: Params) -> Tensor:
        return torch.nn.functional.cross_entropy(torch.func.functional_call(module, params, (x,)), y)

    theta = module.state_dict()
    v = type(theta)((name, torch.randn_like(p)) for name, p in theta.items())
    want = hvp(f, dict(theta), dict(v))
    for point in (theta, nn.ParameterDict(theta)):
        got = hvp(f, point, v, mode=mode)  # type: ignore[type-var]
        assert list(got) == list(want)
        torch.testing.assert_close(dict(got), dict(want))


def test_gauss_newton_needs_no_forward_formula_of_the_loss() -> None:
    x, v, z = torch.randn(2, 3, dtype=DOUBLE), torch.randn(2, 3, dtype=DOUBLE), torch.randn(2, 3, dtype=DOUBLE)

    def loss(p: Tensor) -> Tensor:
        return torch.nn.functional.huber_loss(p, z)

    torch.testing.assert_close(
        gauss_newton_vp(lambda x: 2 * x, loss, x, v), 4 * hvp(loss, 2 * x, v, mode="reverse_over_reverse")
    )
    with pytest.raises(NotImplementedError, match=r"gauss_newton_vp.*of a model and a loss"):
        gauss_newton_vp(lambda x: torch.cdist(x, z), torch.sum, x, v)
