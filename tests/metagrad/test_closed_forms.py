"""The meta-gradient against closed forms, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from metalearn import Episodes, InnerLoop, Params, meta_gradient
from metalearn.metagrad import ENGINES

DOUBLE = torch.float64


def linear(params: Params, x: Tensor) -> Tensor:
    return x @ params["w"]


def regression(*, tasks: int, support: int, query: int, features: int) -> Episodes:
    return Episodes(
        torch.randn(tasks, support, features, dtype=DOUBLE),
        torch.randn(tasks, support, dtype=DOUBLE),
        torch.randn(tasks, query, features, dtype=DOUBLE),
        torch.randn(tasks, query, dtype=DOUBLE),
    )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_quadratic_closed_form(engine: str, second_order: bool, steps: int) -> None:
    # Linear least squares: L_support(w) = |X w - y|^2 / S has the constant Hessian H = 2 X'X / S and the minimum s, so
    # w_K - s = (I - lr H)^K (w - s), and with the query gradient g_q(w) = 2 Z'(Z w - u) / Q:
    #   second order: dL_query(w_K)/dw = (I - lr H)^K g_q(w_K);      first order: g_q(w_K).
    episodes = regression(tasks=4, support=7, query=5, features=3)
    w, lr = torch.randn(3, dtype=DOUBLE), 0.05
    expected = torch.zeros(3, dtype=DOUBLE)
    for x, y, z, u in zip(episodes.support_x, episodes.support_y, episodes.query_x, episodes.query_y, strict=True):
        hessian = 2 * x.T @ x / len(x)
        s = torch.linalg.solve(x.T @ x, x.T @ y)
        shrink = torch.linalg.matrix_power(torch.eye(3, dtype=DOUBLE) - lr * hessian, steps)
        adapted = s + shrink @ (w - s)
        query_gradient = 2 * z.T @ (z @ adapted - u) / len(z)
        expected += (shrink @ query_gradient if second_order else query_gradient) / 4

    inner = InnerLoop(lr=lr, steps=steps, second_order=second_order, engine=engine)
    result = meta_gradient(linear, {"w": w}, episodes, inner, loss=mse_loss)

    torch.testing.assert_close(result.grads["w"], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_one_parameter_closed_form(engine: str) -> None:
    # L_support(w) = a w^3 and L_query(w) = b w^3, so one step gives v = w - 3 lr a w^2, and
    #   second order: 3 b v^2 (1 - 6 lr a w);      first order: 3 b v^2.
    a, b, w, lr = 0.7, 1.3, 0.9, 0.1
    episodes = Episodes(*(torch.full((1, 1), value, dtype=DOUBLE) for value in (a, 0.0, b, 0.0)))

    def cube(params: Params, x: Tensor) -> Tensor:
        return x * params["w"] ** 3

    def value(prediction: Tensor, target: Tensor) -> Tensor:
        return prediction.mean()

    v = w - 3 * lr * a * w**2
    for second_order, expected in ((True, 3 * b * v**2 * (1 - 6 * lr * a * w)), (False, 3 * b * v**2)):
        inner = InnerLoop(lr=lr, steps=1, second_order=second_order, engine=engine)
        result = meta_gradient(cube, {"w": torch.tensor(w, dtype=DOUBLE)}, episodes, inner, loss=value)
        assert result.grads["w"].item() == pytest.approx(expected, rel=1e-13)
        assert result.loss.item() == pytest.approx(b * v**3, rel=1e-13)
