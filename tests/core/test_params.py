"""Checks of parameters, and their copies, gradients and norms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from metalearn import Params
from metalearn.core.params import check_params, expand_over_tasks, global_norm, grad_of


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        *((p, TypeError, f"params is {type(p).__name__} and must be a dictionary of") for p in (None, [1], "theta")),
        (nn.Linear(2, 2), TypeError, "params is Linear and must be a dictionary of tensors"),
        ({"w": torch.zeros(2, device="meta")}, ValueError, r"params\['w'\] is on the meta device and holds no values"),
        ({"w": torch.eye(2).to_sparse()}, TypeError, r"params\['w'\] is stored as torch\.sparse_coo.*x\.to_dense\(\)"),
        (
            {"w": torch.inference_mode()(torch.zeros)(2)},
            ValueError,
            r"params\['w'\] was made inside torch\.inference_mode.*p\.clone",
        ),
        (
            {"w": torch.zeros(2, dtype=torch.complex64)},
            TypeError,
            r"params\['w'\] is torch\.complex64((?!\.float\(\)).)*view_as_real.*view_as_complex((?!\.float\(\)).)*$",
        ),
    ],
)
def test_invalid_params_raise(params: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_params(params)


def test_expand_over_tasks_is_a_differentiable_view() -> None:
    theta = {"w": torch.randn(2, 3, requires_grad=True)}
    fast = expand_over_tasks(theta, 5)["w"]
    assert fast.shape == (5, 2, 3)
    assert fast.data_ptr() == theta["w"].data_ptr()
    fast.sum().backward()
    assert theta["w"].grad is not None
    assert theta["w"].grad.eq(5).all()


def test_grad_of_dictionary() -> None:
    params: Params = {"a": torch.tensor(3.0, requires_grad=True), "b": torch.tensor(2.0, requires_grad=True)}
    grads = grad_of(params["a"] ** 2, params, create_graph=True)
    assert grads["a"].item() == 6
    assert grads["a"].grad_fn is not None
    assert grads["b"].item() == 0


def test_global_norm() -> None:
    assert global_norm({"a": torch.tensor([3.0]), "b": torch.tensor([[0.0, 4.0]])}).item() == 5
