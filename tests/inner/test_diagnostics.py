"""Errors of unsupported operations name the remedy; other errors get a note with the layer and a hint."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from metalearn import Episodes, InnerLoop, functionalize, meta_gradient
from metalearn.inner import explain_torch_errors
from metalearn.metagrad import ENGINES
from tests.inner.notes import full_message

X, Y = torch.randn(4, 5), torch.randint(3, (4,))
IMAGE = torch.randn(1, 1, 8, 8)
BOX = torch.tensor([[0.0, 0.0, 0.0, 4.0, 4.0]])
MISLEADING = r"compare their shapes|one dtype|to_dense"


def compiled(x: Tensor) -> Tensor:
    y: Tensor = torch.compile(torch.tanh, backend="aot_eager")(x)
    return y


NO_SECOND = r"has no second derivative.*second_order=False: first-order MAML.*\(torch: "
CASES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "hardsigmoid": (nn.functional.hardsigmoid, f"^hardsigmoid {NO_SECOND}"),
    "multi_margin_loss": (lambda z: nn.functional.multi_margin_loss(z, Y), f"^multi_margin_loss {NO_SECOND}"),
    "multilabel_margin_loss": (
        lambda z: nn.functional.multilabel_margin_loss(z, torch.zeros(4, 5).long()),
        f"^multilabel_margin_loss {NO_SECOND}",
    ),
    "ctc_loss": (
        lambda z: nn.functional.ctc_loss(
            z.log_softmax(-1)[:, None], torch.ones(1, 1).long(), torch.tensor([4]), torch.tensor([1])
        ),
        f"^ctc_loss {NO_SECOND}",
    ),
    "embedding_bag": (
        lambda z: nn.functional.embedding_bag(torch.tensor([[0, 1], [2, 3]]), z).square(),
        r"^embedding_bag has.*nn\.Embedding and a mean over its words",
    ),
    "segment_reduce": (
        lambda z: torch.segment_reduce(z, "max", lengths=torch.tensor([2, 2])).square(),
        f"^segment_reduce {NO_SECOND}",
    ),
    "standard_gamma": (lambda z: torch.distributions.Gamma(z.exp(), 1.0).rsample(), f"^standard_gamma {NO_SECOND}"),
    "roi_align": (lambda z: torchvision.ops.roi_align(IMAGE * z.sum(), BOX, 2).square(), f"^roi_align {NO_SECOND}"),
    "deform_conv2d": (
        lambda z: torchvision.ops.deform_conv2d(IMAGE * z.sum(), torch.zeros(1, 18, 6, 6), torch.ones(1, 1, 3, 3)),
        f"^deform_conv2d {NO_SECOND}",
    ),
    "compiled": (compiled, r"is compiled \(torch\.compile\).*the module itself, before it is compiled"),
    "no first derivative": (
        lambda z: torch.special.gammainc(z.exp(), torch.ones(4, 5)),
        r"^torch has no derivative of igamma.*another operation, or \.detach\(\)",
    ),
    "reentrant checkpoint": (
        lambda z: checkpoint(torch.tanh, z, use_reentrant=True),
        r"^torch\.utils\.checkpoint .*Call the layers without it",
    ),
    "numpy": (lambda z: z * torch.from_numpy(z.numpy()), r"goes through numpy, which has no gradients"),
}


@pytest.mark.parametrize("name", CASES)
def test_missing_derivative_raises_with_operation_and_remedy(name: str) -> None:
    function, message = CASES[name]

    def twice() -> None:
        z = X.clone().requires_grad_()
        (slope,) = torch.autograd.grad(function(z.tanh()).square().sum(), z, create_graph=True)
        torch.autograd.grad(slope.square().sum(), z)

    with pytest.raises(ValueError, match=f"(?s){message}") as caught, explain_torch_errors({"x": X}):
        twice()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("engine", ENGINES)
def test_embedding_bag_raises_by_every_engine(engine: str) -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.EmbeddingBag(6, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(torch.tanh(self.words(x)))
            return logits

    words, labels = torch.randint(6, (2, 4, 5)), torch.randint(3, (2, 4))
    tasks = Episodes(words, labels, words, labels)
    with pytest.raises(ValueError, match=r"^embedding_bag has no second derivative") as caught:
        meta_gradient(*functionalize(Words()), tasks, InnerLoop(lr=0.1, steps=1, engine=engine))
    assert "mode=" not in str(caught.value), "a remedy of hvp, which the user has not called"
    meta_gradient(*functionalize(Words()), tasks, InnerLoop(lr=0.1, steps=1, engine=engine, second_order=False))


def test_note_is_short_for_a_model_of_many_layers() -> None:
    module = torchvision.models.mobilenet_v3_small(num_classes=3).eval()
    x, y = torch.randn(2, 2, 3, 32, 32), torch.randint(3, (2, 2))
    forward, theta = functionalize(module)
    grey = x[:, :, :1]
    with pytest.raises(RuntimeError, match=r"Raised in layer 'features\.0\.0' \(Conv2d\)\.") as caught:
        meta_gradient(forward, theta, Episodes(grey, y, grey, y), InnerLoop(lr=0.01, steps=1))
    text = full_message(caught.value)
    assert len(text) < 1000
    assert "features.0.0.weight [16, 3, 3, 3]" in text
    assert text.endswith(f" and {len(theta) - 4} more parameters.")


@pytest.mark.parametrize(
    ("message", "hint"),
    [
        ("mat1 and mat2 shapes cannot be multiplied (4x5 and 6x3)", "compare their shapes"),
        ("The size of tensor a (3) must match the size of tensor b (4)", "compare their shapes"),
        ("Expected 3D or 4D (batch mode) tensor", "compare their shapes"),
        ("expected scalar type Long but found Float", "one dtype"),
        ("mat1 and mat2 must have the same dtype, but got Double and Float", "one dtype"),
        ("\"log_softmax\" not implemented for 'Long'", "one dtype"),
        ("Expected all tensors to be on the same device", r"\.to\(device\)"),
        ("index 7 is out of bounds", "Labels must be 0 to N - 1"),
        ("Expected more than 1 value per channel when training, got input size [1, 3]", r"two examples or more"),
        ("reshape is not implemented for sparse tensors", "sparse=False"),
    ],
)
def test_hint_matches_torch_message(message: str, hint: str) -> None:
    with pytest.raises(RuntimeError, match=f"{hint}.* Given: x ") as caught, explain_torch_errors({"x": X}):
        torch._check(False, lambda: message)
    kinds = [kind for kind in MISLEADING.split("|") if kind in full_message(caught.value)]
    assert kinds == ([hint] if hint in MISLEADING else [])


@pytest.mark.parametrize(
    "message",
    ["Cannot access data pointer of Tensor that has no storage", "no such operator", "list index out of range"],
)
def test_other_messages_get_no_hint(message: str) -> None:
    with pytest.raises(RuntimeError) as caught, explain_torch_errors({"x": X}):
        torch._check(False, lambda: message)
    assert full_message(caught.value) == f"{message}\nRaised in the model or the loss. Given: x [4, 5] float32 on cpu."


def test_sparse_inputs_get_a_hint() -> None:
    with pytest.raises(RuntimeError, match=r"x\.to_dense\(\)\. Given"), explain_torch_errors({"x": X.to_sparse()}):
        torch._check(False, lambda: "reshape is not implemented for sparse tensors")


def test_error_of_metalearn_gets_no_note() -> None:
    with pytest.raises(ValueError, match="must be a positive number") as caught, explain_torch_errors({"x": X}):
        InnerLoop(lr=0.0, steps=1)
    assert "Given" not in full_message(caught.value)


def test_note_is_appended_to_the_message_before_python_3_11(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metalearn.inner.diagnostics.sys.version_info", (3, 10))
    with pytest.raises(RuntimeError) as caught, explain_torch_errors({"x": X}):
        torch._check(False, lambda: "no such operator")
    assert str(caught.value) == "no such operator\nRaised in the model or the loss. Given: x [4, 5] float32 on cpu."
