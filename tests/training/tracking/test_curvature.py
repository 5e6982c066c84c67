"""Second-order diagnostics against the dense Hessian of a small problem."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from metalearn import Episodes, Forward, InnerLoop, Params, functionalize, meta_gradient
from metalearn.core.params import expand_over_tasks
from metalearn.derivatives import hessian, top_eigenvalues
from metalearn.inner import total_support_loss
from metalearn.training.tracking.curvature import curvature, support_eigenvalue


def flat(forward: Forward, theta: Params, episodes: Episodes, inner: InnerLoop, second_order: bool) -> Tensor:
    grads = meta_gradient(forward, theta, episodes, dataclasses.replace(inner, second_order=second_order)).grads
    return torch.cat([g.flatten() for g in grads.values()])


def test_diagnostics_equal_dense_computation() -> None:
    forward, theta = functionalize(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double())
    x, y = torch.randn(6, 7, 4, dtype=torch.float64), torch.randint(3, (6, 7))
    episodes, inner = Episodes(x, y, x.flip(1), y.flip(1)), InnerLoop(lr=0.5, steps=2)
    got = curvature(forward, theta, episodes, inner)

    few = episodes.split(2)[0]
    first, second = flat(forward, theta, few, inner, False), flat(forward, theta, few, inner, True)
    assert got["gradients/cosine_first_vs_second"] == pytest.approx(
        (first @ second / first.norm() / second.norm()).item()
    )
    assert got["gradients/cosine_first_vs_second"] < 0.999

    # A task alone: |lam_K| and |lam_0| are the norms of its own first- and second-order meta-gradients.
    for k, order in ((2, False), (0, True)):
        norms = torch.stack([flat(forward, theta, task, inner, order).norm() for task in few.split(1)])
        assert got[f"gradients/adjoint_norm/step_{k}"] == pytest.approx(norms.mean().item())

    dense = hessian(lambda p: cross_entropy(forward(p, x[0]), y[0]), theta)
    matrix = torch.cat(
        [torch.cat([b.reshape(theta[i].numel(), -1) for b in row.values()], dim=1) for i, row in dense.items()]
    )
    top = support_eigenvalue(forward, theta, few)["gradients/support_top_eigenvalue"]
    assert top == pytest.approx(torch.linalg.eigvalsh(matrix)[-1].item(), rel=0.01)


def test_eigenvalue_uses_one_dropout_mask() -> None:
    forward, theta = functionalize(nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3)).double())
    x, y = torch.randn(1, 7, 4, dtype=torch.float64), torch.randint(3, (1, 7))

    def same_mask(params: Params) -> Tensor:
        torch.manual_seed(4)
        return total_support_loss(forward, expand_over_tasks(params, 1), x, y, loss=cross_entropy)

    dense = top_eigenvalues(same_mask, theta, mode="reverse_over_reverse")  # 15 numbers: by the dense matrix
    torch.manual_seed(4)
    top = support_eigenvalue(forward, theta, Episodes(x, y, x, y))["gradients/support_top_eigenvalue"]
    assert top == pytest.approx(dense.item())


def test_diagnostics_preserve_the_generator() -> None:
    forward, theta = functionalize(nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3)))
    x, y = torch.randn(2, 7, 4), torch.randint(3, (2, 7))
    torch.manual_seed(4)
    expected = torch.rand(2)
    torch.manual_seed(4)
    got = curvature(forward, theta, Episodes(x, y, x, y), InnerLoop(lr=0.5, steps=1, second_order=False))
    support_eigenvalue(forward, theta, Episodes(x, y, x, y))
    assert torch.equal(torch.rand(2), expected)
    assert got["gradients/cosine_first_vs_second"] < 0.9999
    assert {"gradients/adjoint_norm/step_0", "gradients/adjoint_norm/step_1"} < got.keys()
