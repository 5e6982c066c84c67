"""Tensors that do not fit a model are refused in our words; what a model raises itself comes through unchanged."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from metalearn import Episodes, InnerLoop, Params, adapt, functionalize, meta_gradient, predict
from metalearn.inner import explain_torch_errors
from metalearn.metagrad import ENGINES

X, Y = torch.randn(3, 6, 4), torch.arange(3).repeat(3, 2)
LINEAR = functionalize(nn.Linear(4, 3))


def by_hand(params: Params, x: Tensor) -> Tensor:
    """As a user writes a model: torch's C++ is called from here, and from no Python of torch's."""
    return x @ params["w"]


MODELS = {"module": LINEAR, "by hand": (by_hand, {"w": torch.randn(4, 3)})}

MISFITS = [
    (X[..., :2], Y, r"(shapes|[Ee]xpected size).*one task's examples.*support_x \[3, 6, 2\] float32 on cpu"),
    (X.double(), Y, r"one dtype.*support_x \[3, 6, 4\] float64.*(w|weight) \[[34], [34]\] float32"),
    ((9 * X).byte(), Y, r"as in images\.float\(\) / 255.*support_x \[3, 6, 4\] uint8 on cpu from \d+ to \d+"),
    (X, Y + 4, r"Labels must be 0 to N - 1.*support_y \[3, 6\] int64 on cpu from 4 to 6"),
    (X, Y - 1, r"Labels must be 0 to N - 1.*support_y \[3, 6\] int64 on cpu from -1 to 1"),
    (X, Y.float(), r"class labels as int64: y\.long\(\).*support_y \[3, 6\] float32"),
]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("x", "y", "message"), MISFITS)
def test_what_does_not_fit_the_model_is_shown(x: Tensor, y: Tensor, message: str, engine: str, model: str) -> None:
    inner = InnerLoop(lr=0.1, steps=1, engine=engine)
    with pytest.raises(ValueError, match=f"(?s)cannot compute with what it is given.*{message}") as caught:
        meta_gradient(*MODELS[model], Episodes(x, y, x, y), inner)
    assert isinstance(caught.value.__cause__, (RuntimeError, IndexError)), "torch's own error stays visible"
    with pytest.raises(ValueError, match=f"(?s){message}"):
        adapt(*MODELS[model], x, y, inner)


@pytest.mark.parametrize("wrong", [lambda x: x[99], lambda x: x.sum(dim=7), lambda x: x[0, 0, 0]])
def test_an_index_out_of_range_in_a_users_line_is_torchs(wrong: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"(?i)(out of (bounds|range)|too many indices).*support_x \[3, 6, 4\]"):
        adapt(lambda params, x: by_hand(params, x) + wrong(x).sum(), MODELS["by hand"][1], X, Y, InnerLoop(0.1, 1))


def test_words_beyond_an_embedding_are_told_so() -> None:
    forward, theta = functionalize(nn.Sequential(nn.Embedding(10, 3), nn.Flatten(), nn.Linear(12, 3)))
    words = torch.randint(10, (3, 6, 4))
    meta_gradient(forward, theta, Episodes(words, Y, words, Y), InnerLoop(lr=0.1, steps=1))
    with pytest.raises(ValueError, match=r"words below.*support_x \[3, 6, 4\] int64 on cpu from 10 to 19"):
        adapt(forward, theta, words + 10, Y, InnerLoop(lr=0.1, steps=1))


def test_inputs_to_predict_that_do_not_fit_are_shown() -> None:
    forward, theta = LINEAR
    fast = adapt(forward, theta, X, Y, InnerLoop(lr=0.1, steps=1))
    with pytest.raises(ValueError, match=r"cannot compute .*\bx \[2, 6, 4\].*weight \[3, 3, 4\]"):
        predict(forward, fast, X[:2])
    with pytest.raises(TypeError, match=r"^x is list and must be a Tensor"):
        predict(forward, fast, X.tolist())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"'weight' is ndarray and must be a Tensor"):
        predict(forward, fast | {"weight": fast["weight"].numpy()}, X)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^params is list and must be a dictionary"):
        predict(forward, list(fast), X)  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [ValueError, KeyError, RuntimeError, IndexError, AssertionError, TypeError])
@pytest.mark.parametrize("engine", ENGINES)
def test_what_a_model_raises_itself_passes_unchanged(engine: str, error: type[Exception]) -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise error("mine")

    with pytest.raises(error, match=r"^'?mine'?$"):
        meta_gradient(*functionalize(Own(4, 3)), Episodes(X, Y, X, Y), InnerLoop(lr=0.1, steps=1, engine=engine))


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
def test_mistakes_in_a_models_code_pass_unchanged(mistake: Callable[[], object]) -> None:
    def forward(params: Params, x: Tensor) -> Tensor:
        mistake()
        return by_hand(params, x)

    with pytest.raises(Exception, match=r"list index|missing|int\(\)|no attribute|recursion") as caught:
        adapt(forward, MODELS["by hand"][1], X, Y, InnerLoop(lr=0.1, steps=1))
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    "words",
    [
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes. Error code 12",
        "DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_running_out_of_memory_passes_unchanged(words: str) -> None:
    with pytest.raises(RuntimeError, match=r"alloc|ALLOC"), explain_torch_errors():
        torch._check(False, lambda: words)
    with (
        pytest.raises(ValueError, match=r"cannot compute with what it is given: another reason\."),
        explain_torch_errors(),
    ):
        torch._check(False, lambda: "another reason")


def test_a_label_that_a_gpu_stumbled_over_is_explained() -> None:
    # As torch raises it, some operations later and without a place.
    with pytest.raises(ValueError, match=r"label outside of 0 to N - 1.*again on the CPU"), explain_torch_errors():
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")


def test_a_real_allocation_that_fails_passes_unchanged() -> None:
    def huge(params: Params, x: Tensor) -> Tensor:
        return by_hand(params, x) + torch.empty(2**55).sum()

    with pytest.raises(RuntimeError, match=r"alloc"):
        adapt(huge, MODELS["by hand"][1], X, Y, InnerLoop(lr=0.1, steps=1))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda prediction, target: 0.5, r"the loss is float and must be a Tensor"),
        (lambda prediction, target: cross_entropy(prediction, target, reduction="none"), r"gave \(6,\) numbers"),
    ],
)
def test_a_loss_that_is_not_one_number_is_refused(loss: Callable[..., Tensor], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        adapt(*LINEAR, X, Y, InnerLoop(lr=0.1, steps=1), loss=loss)


def test_a_model_by_hand_must_return_a_tensor() -> None:
    with pytest.raises(TypeError, match=r"forward's prediction is tuple and must be a Tensor"):
        adapt(lambda params, x: (x,), {"w": torch.zeros(1)}, X, Y, InnerLoop(lr=0.1, steps=1))  # type: ignore[arg-type,return-value]


def test_settings_may_come_from_numpy() -> None:
    own = InnerLoop(lr=0.5, steps=2, task_chunk=2, snapshot_every=2, engine="checkpoint")
    numpys = InnerLoop(
        lr=Fraction(1, 2),  # type: ignore[arg-type]
        steps=np.int64(2),  # type: ignore[arg-type]
        task_chunk=np.int64(2),  # type: ignore[arg-type]
        snapshot_every=np.int64(2),  # type: ignore[arg-type]
        engine="checkpoint",
    )
    assert own == numpys
    expected, got = (meta_gradient(*LINEAR, Episodes(X, Y, X, Y), inner).grads for inner in (own, numpys))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 10**400}, r"lr=1000.*positive number"),
        ({"lr": "0.1"}, r"lr='0\.1'; it must be a positive number"),
        ({"second_order": "false"}, r"second_order='false'; it must be True or False"),
        ({"engine": ["unroll"]}, r"engine=\['unroll'\]; it must be a name"),
        ({"task_chunk": "2"}, r"task_chunk='2'; it must be at least 1"),
    ],
)
def test_settings_of_another_type_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InnerLoop(**{"lr": 0.1, "steps": 1} | settings)  # type: ignore[arg-type]
