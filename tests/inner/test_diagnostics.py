"""Errors of unsupported operations name the remedy; others keep type and message, and get a note with a hint."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from metalearn import Episodes, InnerLoop, Params, adapt, functionalize, meta_gradient, predict
from metalearn.inner import explain_torch_errors
from metalearn.metagrad import ENGINES
from tests.metagrad.models import Lambda

over_engines = pytest.mark.parametrize("engine", ENGINES)
INPUTS = torch.randn(4, 5)
IMAGE, BOX = torch.randn(1, 1, 8, 8), torch.tensor([[0.0, 0.0, 0.0, 4.0, 4.0]])
NO_SECOND = r"has no second derivative.*second_order=False: first-order MAML.*\(torch: "


def full_message(error: BaseException) -> str:
    """Return the message with its notes, as a traceback shows them."""
    return "\n".join([str(error), *getattr(error, "__notes__", [])])


def ctc_loss(z: Tensor) -> Tensor:
    one = torch.tensor([1])
    return functional.ctc_loss(z.log_softmax(-1)[:, None], one.view(1, 1), torch.tensor([4]), one)


NO_DERIVATIVE: dict[str, Callable[[Tensor], Tensor]] = {
    "hardsigmoid": functional.hardsigmoid,
    "multi_margin_loss": lambda z: functional.multi_margin_loss(z, torch.randint(3, (4,))),
    "multilabel_margin_loss": lambda z: functional.multilabel_margin_loss(z, torch.zeros(4, 5).long()),
    "ctc_loss": ctc_loss,
    "segment_reduce": lambda z: torch.segment_reduce(z, "max", lengths=torch.tensor([2, 2])).square(),
    "standard_gamma": lambda z: torch.distributions.Gamma(z.exp(), 1.0).rsample(),
    "roi_align": lambda z: torchvision.ops.roi_align(IMAGE * z.sum(), BOX, 2).square(),
    "deform_conv2d": lambda z: torchvision.ops.deform_conv2d(
        IMAGE * z.sum(), torch.zeros(1, 18, 6, 6), torch.ones(1, 1, 3, 3)
    ),
}
CASES: list[tuple[Callable[[Tensor], Tensor], str]] = [
    *((function, f"^{name} {NO_SECOND}") for name, function in NO_DERIVATIVE.items()),
    (
        lambda z: functional.embedding_bag(torch.tensor([[0, 1], [2, 3]]), z).square(),
        r"^embedding_bag has.*nn\.Embedding and a mean over its words",
    ),
    (
        torch.compile(torch.tanh, backend="aot_eager"),
        r"is compiled \(torch\.compile\).*the module itself, before it is compiled",
    ),
    (
        lambda z: torch.special.gammainc(z.exp(), torch.ones(4, 5)),
        r"^torch has no derivative of igamma.*another operation, or \.detach\(\)",
    ),
    (
        lambda z: checkpoint(torch.tanh, z, use_reentrant=True),
        r"^torch\.utils\.checkpoint .*Call the layers without it",
    ),
    (lambda z: z * torch.from_numpy(z.numpy()), r"goes through numpy, which has no gradients"),
]


@pytest.mark.parametrize(("function", "message"), CASES)
def test_missing_derivative_raises_with_operation_and_remedy(
    function: Callable[[Tensor], Tensor], message: str
) -> None:
    def twice() -> None:
        z = INPUTS.clone().requires_grad_()
        (slope,) = torch.autograd.grad(function(z.tanh()).square().sum(), z, create_graph=True)
        torch.autograd.grad(slope.square().sum(), z)

    with pytest.raises(ValueError, match=f"(?s){message}") as caught, explain_torch_errors({"x": INPUTS}):
        twice()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


@over_engines
def test_embedding_bag_raises_by_every_engine(engine: str) -> None:
    model = functionalize(nn.Sequential(nn.EmbeddingBag(6, 4), nn.Tanh(), nn.Linear(4, 3)))
    words, labels = torch.randint(6, (2, 4, 5)), torch.randint(3, (2, 4))
    tasks = Episodes(words, labels, words, labels)
    with pytest.raises(ValueError, match=r"^embedding_bag has no second derivative") as caught:
        meta_gradient(*model, tasks, InnerLoop(lr=0.1, steps=1, engine=engine))
    assert "mode=" not in str(caught.value), "a remedy of hvp, which the user has not called"
    meta_gradient(*model, tasks, InnerLoop(lr=0.1, steps=1, engine=engine, second_order=False))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            RuntimeError("the derivative for '_cudnn_rnn_backward' is not implemented. Double backwards is not ..."),
            r"cuDNN's kernels .* have no second derivative.*flags\(enabled=False\)",
        ),
        (
            torch.AcceleratorError("CUDA error: device-side assert triggered"),
            r"label outside of 0 to N - 1.*again on the CPU",
        ),
    ],
)
def test_error_of_a_gpu_raises_with_remedy(error: Exception, message: str) -> None:
    with pytest.raises(ValueError, match=message), explain_torch_errors():
        raise error


def test_note_is_short_for_a_model_of_many_layers() -> None:
    module = torchvision.models.mobilenet_v3_small(num_classes=3).eval()
    grey, y = torch.randn(2, 2, 1, 32, 32), torch.randint(3, (2, 2))
    forward, theta = functionalize(module)
    with pytest.raises(RuntimeError, match=r"Raised in layer 'features\.0\.0' \(Conv2d\)\.") as caught:
        meta_gradient(forward, theta, Episodes(grey, y, grey, y), InnerLoop(lr=0.01, steps=1))
    text = full_message(caught.value)
    assert len(text) < 1000
    assert "features.0.0.weight [16, 3, 3, 3]" in text
    assert text.endswith(f" and {len(theta) - 4} more parameters.")


SHAPES, DTYPES = "compare their shapes", "one dtype"


@pytest.mark.parametrize(
    ("message", "hint"),
    [
        ("mat1 and mat2 shapes cannot be multiplied (4x5 and 6x3)", SHAPES),
        ("The size of tensor a (3) must match the size of tensor b (4)", SHAPES),
        ("Expected 3D or 4D (batch mode) tensor", SHAPES),
        ("expected scalar type Long but found Float", DTYPES),
        ("mat1 and mat2 must have the same dtype, but got Double and Float", DTYPES),
        ("\"log_softmax\" not implemented for 'Long'", DTYPES),
        ("Expected all tensors to be on the same device", r"\.to\(device\)"),
        ("index 7 is out of bounds", "Labels must be 0 to N - 1"),
        ("Expected more than 1 value per channel when training, got input size [1, 3]", r"two examples or more"),
        ("reshape is not implemented for sparse tensors", "sparse=False"),
        ("reshape is not implemented for sparse tensors", r"x\.to_dense\(\)"),
    ],
)
def test_hint_matches_torch_message(message: str, hint: str) -> None:
    x = INPUTS.to_sparse() if "to_dense" in hint else INPUTS
    with pytest.raises(RuntimeError, match=f"{hint}.* Given: x ") as caught, explain_torch_errors({"x": x}):
        torch._check(False, lambda: message)
    misleading = {SHAPES, DTYPES, "to_dense"} - {hint, *({"to_dense"} if x.is_sparse else ())}
    assert not any(other in full_message(caught.value) for other in misleading)


ALLOCATOR = "DefaultCPUAllocator: {}: you tried to allocate 9 bytes."
NOTE = "\nRaised in the model or the loss. Given: x [4, 5] float32 on cpu."


@pytest.mark.parametrize(
    ("message", "note"),
    [
        ("Cannot access data pointer of Tensor that has no storage", NOTE),
        ("no such operator", NOTE),
        ("list index out of range", NOTE),
        (ALLOCATOR.format("can't allocate memory") + " Error code 12", ""),
        (ALLOCATOR.format("not enough memory"), ""),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", ""),
    ],
)
@pytest.mark.parametrize("version", [sys.version_info, (3, 10)])
def test_other_messages_get_no_hint_and_out_of_memory_no_note(
    message: str, note: str, version: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metalearn.inner.diagnostics.sys.version_info", version)
    with pytest.raises(RuntimeError) as caught, explain_torch_errors({"x": INPUTS}):
        torch._check(False, lambda: message)
    assert full_message(caught.value) == message + note
    assert str(caught.value) == (message + note if version < (3, 11) else message)


def test_error_of_metalearn_gets_no_note() -> None:
    with pytest.raises(ValueError, match="must be a positive number") as caught, explain_torch_errors({"x": INPUTS}):
        InnerLoop(lr=0.0, steps=1)
    assert "Given" not in full_message(caught.value)


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
@over_engines
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
    wrong: list[tuple[Any, Any, str]] = [
        (fast, X[:2], r"predict: x is \[2, 6, 4\], the examples of 2 tasks, .* of 3\."),
        (fast, X.tolist(), r"^x\[0\]\[0\]\[0\] is float and must be a Tensor"),
        (fast | {"weight": fast["weight"].numpy()}, X, r"'weight' is ndarray and must be a Tensor"),
        (list(fast), X, r"^params is list and must be a dictionary"),
    ]
    for params, x, message in wrong:
        with pytest.raises((ValueError, RuntimeError, TypeError), match=message):
            predict(forward, params, x)


@pytest.mark.parametrize("error", [ValueError, KeyError, RuntimeError, IndexError, AssertionError, TypeError])
@over_engines
def test_error_raised_by_the_model_keeps_type_and_message(engine: str, error: type[Exception]) -> None:
    def fail(x: Tensor) -> Tensor:
        raise error("mine")

    model = functionalize(nn.Sequential(nn.Linear(4, 3), Lambda(fail)))
    with pytest.raises(error) as caught:
        meta_gradient(*model, Episodes(X, Y, X, Y), InnerLoop(lr=0.1, steps=1, engine=engine))
    assert type(caught.value) is error
    assert caught.value.args == ("mine",) or sys.version_info < (3, 11)
    assert "compare their shapes" not in full_message(caught.value)


def endless() -> None:
    endless()


@pytest.mark.parametrize(
    "mistake",
    [lambda: [1, 2][5], lambda: dict[str, int]()["missing"], lambda: int("x"), lambda: nn.Flatten().nope, endless],
)
def test_mistake_in_the_models_code_keeps_its_error(mistake: Callable[[], object]) -> None:
    def forward(params: Params, x: Tensor) -> Tensor:
        mistake()
        return by_hand(params, x)

    with pytest.raises(Exception, match=r"list index|missing|int\(\)|no attribute|recursion") as caught:
        adapt(forward, MODELS["by hand"][1], X, Y, InnerLoop(lr=0.1, steps=1))
    assert caught.value.__cause__ is None
    assert "Labels must be" not in full_message(caught.value)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda prediction, target: 0.5, r"the loss is float and must be a Tensor"),
        (partial(functional.cross_entropy, reduction="none"), r"gave \(6,\) numbers .*reduction='mean'"),
    ],
)
def test_loss_that_is_not_one_number_raises(loss: Callable[..., Tensor], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        adapt(*LINEAR, X, Y, InnerLoop(lr=0.1, steps=1), loss=loss)


def test_model_that_returns_no_tensor_raises() -> None:
    with pytest.raises(TypeError, match=r"forward's prediction\[1\] is int and must be a Tensor"):
        adapt(lambda params, x: (x, 1), {"w": torch.zeros(1)}, X, Y, InnerLoop(lr=0.1, steps=1))
