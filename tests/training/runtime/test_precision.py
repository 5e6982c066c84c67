"""A lower precision is measured before it is trusted, and raises if its meta-gradient is wrong."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metalearn import Episodes, InnerLoop, MetaGradient, Params, functionalize, meta_gradient
from metalearn.config.compose import compose, to_dataclass
from metalearn.config.schema import TrainConfig
from metalearn.config.validation import validate_train_config
from metalearn.core.errors import ConfigError, RunError
from metalearn.core.params import relative_error
from metalearn.metagrad import ENGINES, Engine
from metalearn.metagrad.unroll import unroll
from metalearn.models import Conv4
from metalearn.training.experiment import training_device
from metalearn.training.runtime.precision import (
    PrecisionReport,
    check_precision,
    check_tf32_available,
    precision_context,
)
from tests.factories import image_episodes
from tests.metagrad.models import MODELS


def check(
    module: nn.Module, inner: InnerLoop, *, precision: str = "bfloat16", shots: int = 5, queries: int = 5
) -> PrecisionReport:
    """Check the precision on random images; the random generator must be left as it was."""
    episodes = image_episodes(shots=shots, queries=queries, dtype=torch.float32)
    forward, theta = functionalize(module)
    before = torch.get_rng_state()
    try:
        return check_precision(forward, theta, episodes, inner, precision=precision)
    finally:
        assert torch.equal(torch.get_rng_state(), before)


def first_order(*args: Any) -> MetaGradient:
    forward, params, episodes, inner, loss = args
    return unroll(forward, params, episodes, dataclasses.replace(inner, second_order=False), loss)


def no_number(*args: Any) -> MetaGradient:
    result = unroll(*args)
    return dataclasses.replace(result, grads={name: g * float("nan") for name, g in result.grads.items()})


@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("engine", ENGINES)
def test_report_holds_the_rounding_error(engine: str, second_order: bool) -> None:
    # bfloat16 keeps 8 bits: it cannot leave a gradient unchanged, nor move this small network's by a tenth.
    report = check(Conv4(3, width=6), InnerLoop(lr=0.1, steps=2, engine=engine, second_order=second_order))
    assert report.precision == "bfloat16"
    assert report.tasks == 2
    assert report.engine_error < 0.01
    assert 1e-4 < report.rounding_error < 0.1
    assert 0.01 < report.null_error < 1  # ReLU has kinks near by
    assert report.allowed == max(2 * report.null_error, 0.05)
    moves = f"2 tasks: rounding moves the meta-gradient by {report.rounding_error:.2g} of its length"
    assert f"{moves} ({report.allowed:.2g} is allowed)" in str(report)


def test_errors_equal_their_definitions() -> None:
    forward, theta = functionalize(MODELS["transformer"]())
    episodes = image_episodes(shots=5, queries=5, dtype=torch.float32)
    inner = InnerLoop(lr=0.1, steps=2, engine="adjoint")
    report = check_precision(forward, theta, episodes, inner, precision="bfloat16")
    few = Episodes(*(t[:2] for t in vars(episodes).values()))

    def vector(at: Params = theta, engine: str = "unroll", rounded: bool = False) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=rounded):
            grads = meta_gradient(forward, at, few, dataclasses.replace(inner, engine=engine)).grads
        return torch.cat([g.flatten() for g in grads.values()]).double()

    def error(got: Tensor, expected: Tensor) -> float:
        return float((got - expected).norm() / expected.norm())

    exact, rounded = vector(), vector(engine="adjoint", rounded=True)
    assert report.rounding_error == pytest.approx(error(rounded, exact), rel=1e-5)
    assert report.engine_error == pytest.approx(error(rounded, vector(rounded=True)), rel=1e-5)
    # Rounding to nearest moves every parameter by up to 2^-8 of itself, as the null's random moves do.
    nearest = {name: p.bfloat16().float() for name, p in theta.items()}
    assert error(vector(nearest), exact) / 5 < report.null_error < 5 * error(vector(nearest), exact)


@pytest.mark.parametrize(
    ("broken", "message"),
    [(first_order, "the engine adjoint and unroll differ by "), (no_number, r"its gradient is not finite.*is nan in")],
)
def test_broken_engine_raises(broken: Engine, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENGINES, "adjoint", broken)
    with pytest.raises(RunError, match=rf"{message}.*Set run\.precision=float32"):
        check(Conv4(3, width=6), InnerLoop(lr=0.1, steps=2, engine="adjoint"))


def test_rounding_beyond_the_null_raises() -> None:
    # BatchNorm over one example a class: rounding moves the gradient by more than the whole second-order term.
    with pytest.raises(RunError, match=r"rounding moves .* twice as far as float32's own .*run\.precision"):
        check(MODELS["mlp"](), InnerLoop(lr=0.1, steps=2), shots=1, queries=3)


class NearKinks(nn.Module):
    """ReLUs of inputs so close to the kinks that rounding moves them across."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(28 * 28, 64, bias=False), nn.Linear(64, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.body(x.flatten(1))
        logits: Tensor = self.head((features - features.detach().round(decimals=2) + 1e-7).relu())
        return logits


def test_rounding_within_the_null_passes() -> None:
    # Rounding moves this gradient further than half of its second-order term.
    report = check(NearKinks(), InnerLoop(lr=1e-3, steps=1))
    assert report.rounding_error > 0.5
    assert report.null_error > 0.5


def test_wrong_kernel_raises_below_half_of_the_second_order_term() -> None:
    # Measured: 0.44 of the gradient, of which half of the second-order term is 0.63; moved parameters make 0.05.
    module = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 16), nn.Tanh(), Shrunk(16, 3))
    with pytest.raises(RunError, match=r"rounding moves the meta-gradient by .*run\.precision=float32"):
        check(module, InnerLoop(lr=0.2, steps=1))


class Shrunk(nn.Linear):
    """A layer that is wrong by 10% in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return 0.9 * y if torch.is_autocast_enabled("cpu") else y


def test_smooth_model_may_exceed_twice_its_null() -> None:
    # Both are some thousandths here, as are those of most models without kinks.
    report = check(nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 3)), InnerLoop(lr=1e-5, steps=1))
    assert report.allowed == 0.05


class OtherSign(nn.Linear):
    """A layer whose outputs have the wrong sign in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x.flatten(1))
        return -y if y.dtype == torch.bfloat16 else y


@pytest.mark.parametrize("inner", [InnerLoop(lr=1e-3, steps=1, second_order=False), InnerLoop(lr=0.1, steps=0)])
def test_wrong_sign_raises_in_first_order_and_without_steps(inner: InnerLoop) -> None:
    with pytest.raises(RunError, match=r"and 0\.05 is allowed.* Set run\.precision=float32"):
        # under vmap a bias is added in float32, and so is the result
        check(OtherSign(28 * 28, 3, bias=False), inner)


class Overflows(nn.Linear):
    """Outputs computed from numbers above 65504, the largest of float16."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1)) * 1e8 / 1e8


def test_overflow_names_the_precision() -> None:
    with pytest.raises(RunError, match=r"In float16 the loss or its gradient is not finite.*run\.precision=float32"):
        check(Overflows(28 * 28, 3, bias=False), InnerLoop(lr=0.1, steps=1), precision="float16")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("chunk", [None, 1])
def test_check_precision_repeats_draws(chunk: int | None, engine: str) -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 3))
    report = check(module, InnerLoop(lr=0.1, steps=2, engine=engine, task_chunk=chunk, checkpoint_every=2))
    assert report.rounding_error < 0.1, "another mask would move the gradient by its own length"


def test_reference_is_float32_inside_autocast() -> None:
    reports = []
    for enabled in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            reports.append(check(Conv4(3, width=6), InnerLoop(lr=0.1, steps=2)))
    assert reports[0] == reports[1]


def test_relative_error_is_of_the_whole_gradient() -> None:
    # |(0, 1, 0)| / |(2, 2, 1)| = 1/3, and float32 against float64 is compared in float64
    expected = {"a": torch.tensor([2.0, 2.0], dtype=torch.float64), "b": torch.tensor([1.0], dtype=torch.float64)}
    assert relative_error({"a": torch.tensor([2.0, 3.0]), "b": torch.tensor([1.0])}, expected) == pytest.approx(1 / 3)


def fp32_settings() -> list[str]:
    """Return how GPUs multiply float32, in convolutions and in matrix products."""
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    return [conv.fp32_precision, matmul.fp32_precision]


@pytest.mark.parametrize(
    ("precision", "inside"), [("float32", "ieee"), ("tf32", "tf32"), ("bfloat16", "ieee"), ("float16", "ieee")]
)
@pytest.mark.filterwarnings("ignore:.*CUDA is not available")  # the flags can be set without
def test_precision_context_sets_fp32_matmul_precision(precision: str, inside: str) -> None:
    before = fp32_settings()
    with precision_context(precision, torch.device("cuda")):
        assert fp32_settings() == [inside, inside]
        with precision_context("float32", torch.device("cuda")):
            assert fp32_settings() == ["ieee", "ieee"], "the reference is in all bits"
        assert fp32_settings() == [inside, inside]
    assert fp32_settings() == before
    with pytest.raises(KeyError), precision_context(precision, torch.device("cuda")):
        raise KeyError
    assert fp32_settings() == before


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_precision_context_on_a_cpu_only_autocasts(precision: str) -> None:
    before = fp32_settings()
    with precision_context(precision, torch.device("cpu")):
        assert fp32_settings() == before
        assert torch.is_autocast_enabled("cpu") == (precision == "bfloat16")


def tf32(*more: str) -> TrainConfig:
    return to_dataclass(compose("train", ["data=glyphs", "run.precision=tf32", *more]), TrainConfig)


def test_tf32_on_a_cpu_raises_in_validation() -> None:
    message = r"^run\.precision=tf32: .* run\.device is a CPU; take run\.precision=float32"
    with pytest.raises(ConfigError, match=message):
        validate_train_config(tf32("run.device=cpu"))
    validate_train_config(tf32("run.device=cpu"), trains=False)  # a model that a GPU has trained is tested anywhere
    validate_train_config(tf32("run.device=cuda"))
    validate_train_config(tf32())


def test_tf32_raises_on_an_older_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"run\.precision=tf32: .* run\.device is a CPU"):
        training_device(tf32())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    check_tf32_available("float32", torch.device("cuda"))
    with pytest.raises(ConfigError, match=r"run\.device is Tesla V100"):
        check_tf32_available("tf32", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    check_tf32_available("tf32", torch.device("cuda"))


@pytest.mark.gpu
def test_tf32_error_is_reported() -> None:
    episodes = image_episodes(shots=5, queries=5, dtype=torch.float32)
    on_gpu = Episodes(*(t.cuda() for t in vars(episodes).values()))
    forward, theta = functionalize(Conv4(3, width=64).cuda())
    report = check_precision(forward, theta, on_gpu, InnerLoop(lr=0.1, steps=2), precision="tf32")
    assert report.precision == "tf32"
    # It keeps 11 bits: more than float32's own 24 would move, and less than bfloat16's 8.
    assert 1e-6 < report.rounding_error < 0.05
    assert f"tf32 on 2 tasks: rounding moves the meta-gradient by {report.rounding_error:.2g}" in str(report)
