"""Unsupported models, parameters and losses raise with the fault, its reason and the remedy."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from metalearn import Episodes, InnerLoop, Params, adapt, functionalize, meta_gradient, predict
from metalearn.core.errors import NonFiniteLossError
from metalearn.inner import explain_torch_errors
from metalearn.metagrad import ENGINES


def sequences(tasks: int = 3) -> Episodes:
    x, y = torch.randn(tasks, 6, 5, 8), torch.randint(3, (tasks, 6))
    return Episodes(x, y, x, y)


class InPlace(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "tracked":
            self.weight.mul_(0.9)
        elif self.how == "data":
            self.weight.data.mul_(0.9)
        else:
            with torch.no_grad():
                self.weight.mul_(0.9)
        return x.mean(dim=1) @ self.weight


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("how", ["tracked", "data", "no_grad"])
@pytest.mark.parametrize("tasks", [1, 3])  # one task's expanded weights do not overlap, so that torch does not raise
def test_inplace_write_to_fast_weight_raises(tasks: int, how: str, engine: str) -> None:
    forward, theta = functionalize(InPlace(how))
    with pytest.raises(ValueError, match=r"in place.*w = 0\.9 \* w|reads or writes \.data.*w = 0\.9 \* w"):
        meta_gradient(forward, theta, sequences(tasks), InnerLoop(lr=0.1, steps=2, engine=engine))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("tasks", [1, 3])
def test_inplace_write_to_inputs_raises(tasks: int, second_order: bool, engine: str) -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(40, 3))
    inner = InnerLoop(lr=0.1, steps=2, engine=engine, second_order=second_order)
    with pytest.raises(ValueError, match=r"the inputs x: the model changes it in place.*no inplace=True in a first"):
        meta_gradient(*functionalize(model), sequences(tasks), inner)


def test_inplace_write_to_activation_raises() -> None:
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(40, 3)

        def forward(self, x: Tensor) -> Tensor:
            h: Tensor = self.linear(x.flatten(1)).sigmoid()
            h += 1
            return h

    model = Overwrites()
    with pytest.raises(ValueError, match=r"a parameter, an input or an activation.*h = h \+ 1, not h \+= 1"):
        meta_gradient(*functionalize(model), sequences(), InnerLoop(lr=0.1, steps=2))


class OwnNoise(nn.Module):
    """Draws from a generator that the engines cannot rewind."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(40, 3)
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn(40, generator=self.generator)
        logits: Tensor = self.linear(x.flatten(1) + noise)
        return logits


@pytest.mark.parametrize("engine", ["checkpoint", "adjoint"])
def test_model_with_its_own_generator_raises_when_recomputed(engine: str) -> None:
    forward, theta = functionalize(OwnNoise())
    message = (
        r"support loss of inner step 1 was .* on the way forwards and .* when it was computed again.*engine='unroll'"
    )
    with pytest.raises(ValueError, match=message):
        meta_gradient(forward, theta, sequences(), InnerLoop(lr=0.1, steps=2, engine=engine))
    meta_gradient(forward, theta, sequences(), InnerLoop(lr=0.1, steps=2, engine=engine, second_order=False))


def test_out_of_memory_does_not_disable_forward_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def exhausted(*args: object, mode: str) -> None:
        calls.append(mode)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB in forward mode")

    monkeypatch.setattr(sys.modules["metalearn.metagrad.adjoint"], "value_and_hvp", exhausted)
    forward, theta = functionalize(nn.Sequential(nn.Flatten(), nn.Linear(40, 3)))
    with pytest.raises(torch.OutOfMemoryError):
        meta_gradient(forward, theta, sequences(), InnerLoop(lr=0.1, steps=1, engine="adjoint"))
    assert calls == ["forward_over_reverse"]


def test_inference_mode_raises_except_for_predict() -> None:
    forward, theta = functionalize(nn.Sequential(nn.Flatten(), nn.Linear(40, 3)))
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


class InsistsOnFlash(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unsqueeze(1) for t in self.qkv(x).chunk(3, dim=-1))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(q, k, v).squeeze(1).mean(dim=1)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch, on the kernel's lack of a batching rule
@pytest.mark.parametrize("engine", ENGINES)
def test_forced_flash_attention_raises(engine: str) -> None:
    forward, theta = functionalize(InsistsOnFlash())
    with pytest.raises(ValueError, match=r"no second derivative.*remove the sdpa_kernel"):
        meta_gradient(forward, theta, sequences(), InnerLoop(lr=0.1, steps=1, engine=engine))


def test_integer_parameter_raises() -> None:
    forward, theta = functionalize(nn.Sequential(nn.Flatten(), nn.Linear(40, 3)))
    theta["1.bias"] = torch.zeros(3, dtype=torch.int64)
    episodes = sequences()
    message = r"params\['1\.bias'\] is torch\.int64: only floating-point.*\.float\(\)"
    with pytest.raises(TypeError, match=message):
        meta_gradient(forward, theta, episodes, InnerLoop(lr=0.1, steps=1))
    with pytest.raises(TypeError, match=message):
        adapt(forward, theta, episodes.support_x, episodes.support_y, InnerLoop(lr=0.1, steps=1))
    with pytest.raises(ValueError, match=r"params is empty"):
        meta_gradient(forward, {}, episodes, InnerLoop(lr=0.1, steps=1))


def nan_in_task(task: int, episodes: Episodes, *, query: bool = False) -> Episodes:
    support, queries = episodes.support_x.clone(), episodes.query_x.clone()
    (queries if query else support)[task, 0] = math.nan
    return Episodes(support, episodes.support_y, queries, episodes.query_y)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("query", [False, True])
def test_nan_loss_raises_with_task_and_step(query: bool, chunk: int | None, engine: str) -> None:
    forward, theta = functionalize(nn.Sequential(nn.Flatten(), nn.Linear(40, 3)))
    episodes = nan_in_task(3, sequences(5), query=query)
    inner = InnerLoop(lr=0.1, steps=2, engine=engine, task_chunk=chunk)
    with pytest.raises(NonFiniteLossError) as caught:
        meta_gradient(forward, theta, episodes, inner)
    if not query:
        with pytest.raises(NonFiniteLossError, match="support loss of task 3 is nan after 0 inner steps"):
            adapt(forward, theta, episodes.support_x, episodes.support_y, inner)
    error = caught.value
    assert (error.kind, error.task, error.step) == (("query", 3, 2) if query else ("support", 3, 0))
    assert f"the {error.kind} loss of task 3 is nan after {error.step} inner steps" in str(error)


@pytest.mark.parametrize("engine", ENGINES)
def test_diverging_inner_loop_raises_with_remedy(engine: str) -> None:
    # L(w) = w^4 / 4 from w = 1 with lr = 1e4 overshoots to -1e4, 1e16, ...: infinite in float32 within some steps.
    def forward(params: Params, x: Tensor) -> Tensor:
        return params["w"] ** 4 / 4 * torch.ones_like(x[:, 0])

    x = torch.ones(1, 1, 1)
    with pytest.raises(NonFiniteLossError, match=r"one step earlier; take a smaller inner\.lr or fewer inner\.steps"):
        meta_gradient(
            forward,
            {"w": torch.tensor(1.0)},
            Episodes(x, x, x, x),
            InnerLoop(lr=1e4, steps=8, engine=engine),
            loss=lambda prediction, target: prediction.mean(),
        )
