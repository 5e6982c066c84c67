"""Unsupported models, parameters and losses raise with the fault, its reason and the remedy."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from metalearn import InnerLoop, adapt, functionalize, meta_gradient, predict
from metalearn.inner import explain_torch_errors
from metalearn.inner.diagnostics import defer_loss_checks
from metalearn.metagrad import ENGINES
from tests.metagrad.models import Lambda, linear_on_sequences
from tests.metagrad.settings import sequences

WRITES: dict[str, Callable[[Tensor], object]] = {
    "tracked": lambda w: w.mul_(0.9),
    "data": lambda w: w.data.mul_(0.9),
    "no_grad": torch.no_grad()(lambda w: w.mul_(0.9)),
}


class WritesToWeight(nn.Linear):
    def __init__(self, how: str) -> None:
        super().__init__(40, 3)
        self.write = WRITES[how]

    def forward(self, x: Tensor) -> Tensor:
        self.write(self.weight)
        return super().forward(x.flatten(1))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("how", WRITES)
@pytest.mark.parametrize("tasks", [1, 3])  # one task's expanded weights do not overlap, so that torch does not raise
def test_inplace_write_to_fast_weight_raises(tasks: int, how: str, engine: str) -> None:
    forward, theta = functionalize(WritesToWeight(how))
    with pytest.raises(ValueError, match=r"in place.*w = 0\.9 \* w|reads or writes \.data.*w = 0\.9 \* w"):
        meta_gradient(forward, theta, sequences(tasks), InnerLoop(lr=0.1, steps=2, engine=engine))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("tasks", [1, 3])
def test_inplace_write_to_inputs_raises(tasks: int, second_order: bool, engine: str) -> None:
    forward, theta = functionalize(linear_on_sequences(nn.ReLU(inplace=True)))
    inner = InnerLoop(lr=0.1, steps=2, engine=engine, second_order=second_order)
    with pytest.raises(ValueError, match=r"the inputs x: the model changes it in place.*no inplace=True in a first"):
        meta_gradient(forward, theta, sequences(tasks), inner)


def test_inplace_write_to_activation_raises() -> None:
    model = nn.Sequential(*linear_on_sequences(), nn.Sigmoid(), Lambda(lambda h: h.add_(1)))
    with pytest.raises(ValueError, match=r"a parameter, an input or an activation.*h = h \+ 1, not h \+= 1"):
        meta_gradient(*functionalize(model), sequences(), InnerLoop(lr=0.1, steps=2))


@pytest.mark.parametrize("engine", ["checkpoint", "adjoint"])
def test_model_with_its_own_generator_raises_when_recomputed(engine: str) -> None:
    generator = torch.Generator().manual_seed(0)  # which the engines cannot rewind
    noise = Lambda(lambda x: x + torch.randn(5, 8, generator=generator))
    forward, theta = functionalize(linear_on_sequences(noise))
    message = r"support loss of inner step 1 was .* in the forward pass and .* when it was recomputed.*engine='unroll'"
    with pytest.raises(ValueError, match=message):
        meta_gradient(forward, theta, sequences(), InnerLoop(lr=0.1, steps=2, engine=engine))
    with defer_loss_checks():  # the caller's check of the loss finds it
        deferred = meta_gradient(forward, theta, sequences(), InnerLoop(lr=0.1, steps=2, engine=engine))
    assert deferred.loss.isnan()
    meta_gradient(forward, theta, sequences(), InnerLoop(lr=0.1, steps=2, engine=engine, second_order=False))


@pytest.mark.parametrize("engine", ["checkpoint", "adjoint"])
def test_deferred_check_of_recomputation_changes_no_loss(engine: str) -> None:
    forward, theta = functionalize(linear_on_sequences(nn.Tanh()))
    inner, tasks = InnerLoop(lr=0.1, steps=2, engine=engine), sequences()
    expected = meta_gradient(forward, theta, tasks, inner).loss
    with defer_loss_checks():
        assert torch.equal(meta_gradient(forward, theta, tasks, inner).loss, expected)


def test_out_of_memory_does_not_disable_forward_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def exhausted(*args: object, mode: str) -> None:
        calls.append(mode)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB in forward mode")

    monkeypatch.setattr(sys.modules["metalearn.metagrad.adjoint"], "value_and_hvp", exhausted)
    with pytest.raises(torch.OutOfMemoryError):
        meta_gradient(*functionalize(linear_on_sequences()), sequences(), InnerLoop(0.1, 1, engine="adjoint"))
    assert calls == ["forward_over_reverse"]


def test_inference_mode_raises_except_for_predict() -> None:
    forward, theta = functionalize(linear_on_sequences())
    episodes, inner = sequences(), InnerLoop(lr=0.1, steps=1)
    fast = adapt(forward, theta, episodes.support_x, episodes.support_y, inner)
    with torch.inference_mode():
        with pytest.raises(RuntimeError, match=r"no gradients inside torch\.inference_mode\(\).*torch\.no_grad\(\)"):
            meta_gradient(forward, theta, episodes, inner)
        with pytest.raises(RuntimeError, match=r"inference_mode"):
            adapt(forward, theta, episodes.support_x, episodes.support_y, inner)
        copies = {name: w.clone() for name, w in fast.items()}
        assert predict(forward, copies, episodes.query_x).shape == (3, 6, 3)


def test_cudnn_message_raises_with_remedy() -> None:
    # As torch raises it on a GPU, in _cudnn_rnn_backward's derivative.
    with (
        pytest.raises(ValueError, match=r"cuDNN's kernels .* have no second derivative.*flags\(enabled=False\)"),
        explain_torch_errors(),
    ):
        raise RuntimeError(
            "the derivative for '_cudnn_rnn_backward' is not implemented. Double backwards is not supported for CuDNN "
            "RNNs due to limitations in the CuDNN API."
        )


@sdpa_kernel(SDPBackend.FLASH_ATTENTION)
def flash_attention(qkv: Tensor) -> Tensor:
    q, k, v = (t.unsqueeze(1) for t in qkv.chunk(3, dim=-1))
    return scaled_dot_product_attention(q, k, v).squeeze(1).mean(dim=1)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch, on the kernel's lack of a batching rule
@pytest.mark.parametrize("engine", ENGINES)
def test_forced_flash_attention_raises(engine: str) -> None:
    forward, theta = functionalize(nn.Sequential(nn.Linear(8, 24), Lambda(flash_attention)))
    with pytest.raises(ValueError, match=r"no second derivative.*remove the sdpa_kernel"):
        meta_gradient(forward, theta, sequences(), InnerLoop(lr=0.1, steps=1, engine=engine))


def test_integer_parameter_and_no_parameter_raise() -> None:
    forward, theta = functionalize(linear_on_sequences())
    theta["1.bias"] = torch.zeros(3, dtype=torch.int64)
    episodes, inner = sequences(), InnerLoop(lr=0.1, steps=1)
    message = r"params\['1\.bias'\] is torch\.int64: only floating-point.*\.float\(\)"
    with pytest.raises(TypeError, match=message):
        meta_gradient(forward, theta, episodes, inner)
    with pytest.raises(TypeError, match=message):
        adapt(forward, theta, episodes.support_x, episodes.support_y, inner)
    with pytest.raises(ValueError, match=r"params is empty"):
        meta_gradient(forward, {}, episodes, inner)
