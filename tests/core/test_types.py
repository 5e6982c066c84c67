"""Episodes raise on tensors that do not belong together."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from metalearn import Episodes
from tests.factories import image_episodes

X, Y = torch.zeros(2, 5, 3), torch.zeros(2, 5).long()


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ((X, Y, X[:1], Y[:1]), ValueError, r"same number of tasks.*'query_x': \(1, 5, 3\)"),
        ((X, Y[:, :4], X, Y), ValueError, r"same numbers of tasks and examples, got .*'support_y': \(2, 4\)"),
        ((X, Y, X, Y[:, :4]), ValueError, r"same numbers of tasks and examples, got .*'query_y': \(2, 4\)"),
        ((X[:, :0], Y[:, :0], X, Y), ValueError, r"the support set is empty.*\(2, 0, 3\)"),
        ((X[:0], Y[:0], X[:0], Y[:0]), ValueError, r"the support set is empty"),
        ((X, Y[:, 0], X, Y), ValueError, r"support_y has shape \(2,\); it must lead with \[tasks, examples\]"),
        # vmap would compute with memory that nobody wrote to: a loss of 6e-311, and no error.
        ((X, Y, X.to("meta"), Y), ValueError, "query_x is on the meta device and holds no values"),
        (
            (X.to_sparse(), Y, X, Y),
            TypeError,
            r"support_x is stored as torch\.sparse_coo.*x\.to_dense",
        ),
        ((torch.nested.nested_tensor(list(X)), Y, X, Y), TypeError, "support_x is a nested tensor.*list of Episodes"),
        *(
            ((X, Y, X, other), TypeError, f"query_y is {type(other).__name__} and must be a Tensor.*as_tensor")
            for other in (Y.numpy(), "labels")
        ),
        ((X, Y, X, None), TypeError, "query_y is None and must be a Tensor; give one, or leave it out"),
        ((X, Y, X, Y.tolist()), TypeError, r"query_y\[0\]\[0\] is int and must be a Tensor.*as_tensor"),
    ],
)
def test_episodes_raise_on_invalid_tensors(tensors: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Episodes(*tensors)


def test_episodes_accept_any_dtype() -> None:
    for dtype in (torch.int64, torch.uint8, torch.bool, torch.bfloat16, torch.complex64):
        assert Episodes(X.to(dtype), Y, X.to(dtype), Y).tasks == 2


def test_split_keeps_order() -> None:
    episodes = image_episodes(tasks=5)
    parts = episodes.split(2)
    assert [part.tasks for part in parts] == [2, 2, 1]
    torch.testing.assert_close(torch.cat([part.query_x for part in parts]), episodes.query_x)
    torch.testing.assert_close(torch.cat([part.support_y for part in parts]), episodes.support_y)
