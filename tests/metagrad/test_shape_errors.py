"""Errors of mismatched tensors get a note that lists them; errors keep their type and message."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from metalearn import Episodes, InnerLoop, Params, adapt, functionalize, meta_gradient, predict
from metalearn.inner import explain_torch_errors
from metalearn.metagrad import ENGINES
from tests.inner.notes import full_message

X, Y = torch.randn(3, 6, 4), torch.arange(3).repeat(3, 2)
LINEAR = functionalize(nn.Linear(4, 3))


def by_hand(params: Params, x: Tensor) -> Tensor:
    """Compute predictions by torch's C++ alone, without its Python code."""
    return x @ params["w"]


MODELS = {"module": LINEAR, "by hand": (by_hand, {"w": torch.randn(4, 3)})}

MISMATCHES = [
    (X[..., :2], Y, r"(shapes|[Ee]xpected size).*one task's examples.*support_x \[3, 6, 2\] float32 on cpu"),
    (X.double(), Y, r"one dtype.*support_x \[3, 6, 4\] float64.*(w|weight) \[[34], [34]\] float32"),
    ((9 * X).byte(), Y, r"as in images\.float\(\) / 255.*support_x \[3, 6, 4\] uint8 on cpu from \d+ to \d+"),
    (X, Y + 4, r"Labels must be 0 to N - 1.*support_y \[3, 6\] int64 on cpu from 4 to 6"),
    (X, Y - 1, r"Labels must be 0 to N - 1.*support_y \[3, 6\] int64 on cpu from -1 to 1"),
    (X, Y.float(), r"class labels as int64: y\.long\(\).*support_y \[3, 6\] float32"),
]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("x", "y", "message"), MISMATCHES)
def test_mismatched_tensors_are_listed_in_a_note(x: Tensor, y: Tensor, message: str, engine: str, model: str) -> None:
    inner = InnerLoop(lr=0.1, steps=1, engine=engine)
    with pytest.raises((RuntimeError, IndexError), match=f"(?s){message}") as caught:
        meta_gradient(*MODELS[model], Episodes(x, y, x, y), inner)
    assert "\nRaised in " in full_message(caught.value)
    with pytest.raises((RuntimeError, IndexError), match=f"(?s){message}"):
        adapt(*MODELS[model], x, y, inner)


@pytest.mark.parametrize("wrong", [lambda x: x[99], lambda x: x.sum(dim=7), lambda x: x[0, 0, 0]])
def test_index_error_in_a_users_line_gets_a_note(wrong: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(IndexError, match=r"(?is)(out of (bounds|range)|too many indices).*support_x \[3, 6, 4\]"):
        adapt(lambda params, x: by_hand(params, x) + wrong(x).sum(), MODELS["by hand"][1], X, Y, InnerLoop(0.1, 1))


def test_words_beyond_an_embedding_get_a_hint() -> None:
    forward, theta = functionalize(nn.Sequential(nn.Embedding(10, 3), nn.Flatten(), nn.Linear(12, 3)))
    words = torch.randint(10, (3, 6, 4))
    meta_gradient(forward, theta, Episodes(words, Y, words, Y), InnerLoop(lr=0.1, steps=1))
    with pytest.raises(IndexError, match=r"words below.*support_x \[3, 6, 4\] int64 on cpu from 10 to 19"):
        adapt(forward, theta, words + 10, Y, InnerLoop(lr=0.1, steps=1))


def test_predict_raises_for_mismatched_inputs() -> None:
    forward, theta = LINEAR
    fast = adapt(forward, theta, X, Y, InnerLoop(lr=0.1, steps=1))
    with pytest.raises((ValueError, RuntimeError), match=r"Given: x \[2, 6, 4\].*weight \[3, 3, 4\]"):
        predict(forward, fast, X[:2])
    with pytest.raises(TypeError, match=r"^x is list and must be a Tensor"):
        predict(forward, fast, X.tolist())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"'weight' is ndarray and must be a Tensor"):
        predict(forward, fast | {"weight": fast["weight"].numpy()}, X)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^params is list and must be a dictionary"):
        predict(forward, list(fast), X)  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [ValueError, KeyError, RuntimeError, IndexError, AssertionError, TypeError])
@pytest.mark.parametrize("engine", ENGINES)
def test_error_raised_by_the_model_keeps_type_and_message(engine: str, error: type[Exception]) -> None:
    class Raises(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise error("mine")

    with pytest.raises(error) as caught:
        meta_gradient(*functionalize(Raises(4, 3)), Episodes(X, Y, X, Y), InnerLoop(lr=0.1, steps=1, engine=engine))
    assert type(caught.value) is error
    assert caught.value.args == ("mine",) or sys.version_info < (3, 11)
    assert "compare their shapes" not in full_message(caught.value)


def endless() -> None:
    endless()


MISTAKES: list[Callable[[], object]] = [
    lambda: [1, 2][5],
    lambda: dict[str, int]()["missing"],
    lambda: int("x"),
    lambda: nn.Flatten().nope,
    endless,
]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_in_the_models_code_keeps_its_error(mistake: Callable[[], object]) -> None:
    def forward(params: Params, x: Tensor) -> Tensor:
        mistake()
        return by_hand(params, x)

    with pytest.raises(Exception, match=r"list index|missing|int\(\)|no attribute|recursion") as caught:
        adapt(forward, MODELS["by hand"][1], X, Y, InnerLoop(lr=0.1, steps=1))
    assert caught.value.__cause__ is None
    assert "Labels must be" not in full_message(caught.value)


@pytest.mark.parametrize(
    "message",
    [
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes. Error code 12",
        "DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_out_of_memory_gets_no_note(message: str) -> None:
    with pytest.raises(RuntimeError, match=r"alloc|ALLOC") as caught, explain_torch_errors():
        torch._check(False, lambda: message)
    assert full_message(caught.value) == message


def test_device_side_assert_raises_with_remedy() -> None:
    # As torch raises it, some operations later and without a place.
    with pytest.raises(ValueError, match=r"label outside of 0 to N - 1.*again on the CPU"), explain_torch_errors():
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")


def test_failed_allocation_keeps_its_error() -> None:
    def huge(params: Params, x: Tensor) -> Tensor:
        return by_hand(params, x) + torch.empty(2**55).sum()

    with pytest.raises(RuntimeError, match=r"alloc"):
        adapt(huge, MODELS["by hand"][1], X, Y, InnerLoop(lr=0.1, steps=1))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda prediction, target: 0.5, r"the loss is float and must be a Tensor"),
        (
            lambda prediction, target: cross_entropy(prediction, target, reduction="none"),
            r"gave \(6,\) numbers .*reduction='mean'",
        ),
    ],
)
def test_loss_that_is_not_one_number_raises(loss: Callable[..., Tensor], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        adapt(*LINEAR, X, Y, InnerLoop(lr=0.1, steps=1), loss=loss)


def test_model_that_returns_no_tensor_raises() -> None:
    with pytest.raises(TypeError, match=r"forward's prediction is tuple and must be a Tensor"):
        adapt(lambda params, x: (x,), {"w": torch.zeros(1)}, X, Y, InnerLoop(lr=0.1, steps=1))  # type: ignore[arg-type,return-value]
