"""Hessian-vector products at points where a formula is 0/0."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from metalearn import Params
from metalearn.core.errors import NonFiniteGradientError
from metalearn.derivatives import (
    HVP_MODES,
    hessian,
    hvp,
    top_eigenvalues,
)

DOUBLE = torch.float64


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
def test_hvp_at_removable_singularity_is_the_limit(name: str, mode: str) -> None:
    f, factor = SMOOTH[name]
    torch.testing.assert_close(hvp(f, ZERO, AT_ZERO, mode=mode), factor * AT_ZERO, rtol=1e-9, atol=0)


@pytest.mark.parametrize("mode", HVP_MODES)
@pytest.mark.parametrize("name", KINKED)
def test_hvp_raises_without_second_derivative(name: str, mode: str) -> None:
    with pytest.raises(NonFiniteGradientError, match=r"hvp's product is .* in parameter 'x'.*infinite at 0"):
        hvp(KINKED[name], ZERO, AT_ZERO, mode=mode)
    with pytest.raises(NonFiniteGradientError, match=r"in parameter 'w'"):
        hvp(lambda p: KINKED[name](p["w"]), {"w": ZERO}, {"w": AT_ZERO}, mode=mode)


@pytest.mark.parametrize("mode", HVP_MODES)
def test_hvp_of_norm_with_a_kink_is_zero(mode: str) -> None:
    for f in (lambda x: x.norm(1), lambda x: torch.linalg.vector_norm(x, 1), lambda x: torch.dist(x, ZERO, 1)):
        assert not hvp(f, ZERO, AT_ZERO, mode=mode).any()
    rows = torch.eye(3, dtype=DOUBLE)  # a dimension is no order
    got = hvp(lambda x: (torch.linalg.vector_norm(x, 2, 1) ** 2).sum(), 0 * rows, rows, mode=mode)
    torch.testing.assert_close(got, 2 * rows)


@pytest.mark.parametrize("mode", HVP_MODES)
def test_hvp_limit_with_zeros_in_the_direction(mode: str) -> None:
    x = {"a": ZERO, "b": AT_ZERO}

    def f(p: Params) -> Tensor:
        total: Tensor = p["a"].norm() ** 2 + p["b"].norm() ** 2
        return total

    got = hvp(f, x, {"a": ZERO, "b": AT_ZERO}, mode=mode)
    torch.testing.assert_close(got["a"], ZERO, rtol=0, atol=1e-9)
    torch.testing.assert_close(got["b"], 2 * AT_ZERO)
    torch.testing.assert_close(top_eigenvalues(f, x, 2, mode=mode), torch.full((2,), 2.0, dtype=DOUBLE))


def test_hessian_raises_when_not_finite() -> None:
    with pytest.raises(NonFiniteGradientError, match=r"^the Hessian is nan in parameter '[bw]'.*infinite at 0"):
        hessian(lambda p: (p["w"] ** 3).sum() + p["b"].norm() ** 2, {"w": AT_ZERO, "b": ZERO})
