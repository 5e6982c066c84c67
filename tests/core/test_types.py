"""Episodes raise on tensors that do not belong together."""

from __future__ import annotations

import pytest
import torch

from metalearn import Episodes
from tests.factories import image_episodes

X, Y = torch.zeros(2, 5, 3), torch.zeros(2, 5).long()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ((X, Y, X[:1], Y[:1]), r"same number of tasks.*'query_x': \(1, 5, 3\)"),
        ((X, Y[:, :4], X, Y), r"same numbers of tasks and examples, got .*'support_y': \(2, 4\)"),
        ((X, Y, X, Y[:, :4]), r"same numbers of tasks and examples, got .*'query_y': \(2, 4\)"),
        ((X[:, :0], Y[:, :0], X, Y), r"the support set is empty.*\(2, 0, 3\)"),
        ((X[:0], Y[:0], X[:0], Y[:0]), r"the support set is empty"),
        ((X, Y[:, 0], X, Y), r"support_y has shape \(2,\); it must lead with \[tasks, examples\]"),
    ],
)
def test_episodes_raise_on_shapes_that_do_not_match(tensors: tuple[torch.Tensor, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Episodes(*tensors)


@pytest.mark.parametrize("other", [None, Y.tolist(), Y.numpy(), "labels"])
def test_episodes_raise_on_other_types(other: object) -> None:
    with pytest.raises(TypeError, match=rf"query_y is {type(other).__name__} and must be a Tensor.*as_tensor"):
        Episodes(X, Y, X, other)  # type: ignore[arg-type]


def test_episodes_raise_on_meta_tensors() -> None:
    # vmap would compute with memory that nobody wrote to: a loss of 6e-311, and no error.
    with pytest.raises(ValueError, match="query_x is on the meta device and holds no values"):
        Episodes(X, Y, X.to("meta"), Y)


def test_episodes_accept_any_dtype() -> None:
    for dtype in (torch.int64, torch.uint8, torch.bool, torch.bfloat16, torch.complex64):
        assert Episodes(X.to(dtype), Y, X.to(dtype), Y).tasks == 2


def test_split_keeps_order() -> None:
    episodes = image_episodes(tasks=5)
    parts = episodes.split(2)
    assert [part.tasks for part in parts] == [2, 2, 1]
    torch.testing.assert_close(torch.cat([part.query_x for part in parts]), episodes.query_x)
    torch.testing.assert_close(torch.cat([part.support_y for part in parts]), episodes.support_y)
