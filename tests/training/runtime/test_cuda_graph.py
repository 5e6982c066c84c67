"""A captured meta-gradient equals the eager one, or is not used; on CPUs a stand-in captures."""

from __future__ import annotations

import dataclasses
import gc
import math
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metalearn import Episodes, InnerLoop, MetaGradient, Params, functionalize, meta_gradient
from metalearn.core.params import relative_error
from metalearn.inner.diagnostics import defer_loss_checks
from metalearn.training.experiment import build_experiment
from metalearn.training.runtime.cuda_graph import (
    LARGEST_ERROR,
    CUDAGraphMetaGradient,
    Gradient,
    capture,
    with_cuda_graph,
)
from metalearn.training.trainer import train
from tests.config.factories import train_config
from tests.factories import image_episodes
from tests.faults.runs import SMALL, assert_runs_equal, tensors_to_bytes
from tests.training.run_folders import AT_VALIDATIONS

CPU = torch.device("cpu")
INNER = InnerLoop(lr=0.1, steps=2)


class Recorder:
    """Stands in for CUDA: a replay computes again and overwrites the first results.

    Args:
        spoil: what a replay does to its results.
        frozen: whether replays return the first results, as if they did not read their inputs.
    """

    def __init__(self, spoil: Callable[[MetaGradient], object] = lambda result: None, frozen: bool = False) -> None:
        self.spoil, self.frozen = spoil, frozen
        self.recorded = self.replayed = 0

    def __call__(
        self, compute: Callable[[], MetaGradient], device: torch.device
    ) -> tuple[Callable[[], None], MetaGradient]:
        self.recorded += 1
        results = compute()

        def replay() -> None:
            self.replayed += 1
            again = results if self.frozen else compute()
            for name, g in results.grads.items():
                g.copy_(again.grads[name])
            for name in ("loss", "predictions", "support_loss"):
                getattr(results, name).copy_(getattr(again, name))
            self.spoil(results)

        return replay, results


def eager_gradient(*layers: nn.Module) -> tuple[Gradient, Params]:
    forward, theta = functionalize(nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 8), *layers, nn.Linear(8, 3)))
    return (lambda params, episodes: meta_gradient(forward, params, episodes, INNER)), theta


@pytest.fixture
def model() -> tuple[Gradient, Params]:
    return eager_gradient(nn.Tanh())


def batch(**shape: int) -> Episodes:
    return image_episodes(dtype=torch.float32, **shape)


def moved(theta: Params, by: float) -> Params:
    return {name: p + by for name, p in theta.items()}


def assert_equals_eager(gradient: Gradient, eager: Gradient, params: Params, episodes: Episodes) -> None:
    got, expected = gradient(params, episodes), eager(params, episodes)
    assert tensors_to_bytes(vars(got)) == tensors_to_bytes(vars(expected))


def test_replay_equals_eager(model: Any) -> None:
    eager, theta = model
    recorder = Recorder()
    gradient = CUDAGraphMetaGradient(eager, CPU, record=recorder)
    for step in range(5):
        assert_equals_eager(gradient, eager, moved(theta, 0.01 * step), batch())
    for _ in range(2):  # parameters may change in place
        theta["1.weight"].mul_(0.9)
        assert_equals_eager(gradient, eager, theta, batch())
    assert (recorder.recorded, recorder.replayed) == (1, 7)


def test_losses_outlive_the_next_call(model: Any) -> None:
    eager, theta = model
    gradient = CUDAGraphMetaGradient(eager, CPU, record=Recorder())
    for _ in range(2):
        gradient(theta, batch())
    first = gradient(theta, batch())
    loss, support_loss, grads = first.loss.clone(), first.support_loss.clone(), first.grads["1.weight"].clone()
    gradient(theta, batch())
    assert torch.equal(first.loss, loss)
    assert torch.equal(first.support_loss, support_loss)
    assert not torch.equal(first.grads["1.weight"], grads)


def test_other_shapes_are_computed_eagerly(model: Any) -> None:
    eager, theta = model
    recorder = Recorder()
    gradient = CUDAGraphMetaGradient(eager, CPU, record=recorder)
    for shape in ({}, {}, {"tasks": 2}, {"queries": 3}, {}):
        assert_equals_eager(gradient, eager, theta, batch(**shape))
    assert_equals_eager(gradient, eager, {name: p.double() for name, p in theta.items()}, image_episodes())
    assert recorder.replayed == 3


SPOILT: dict[str, tuple[Recorder, int, str]] = {
    # replays until it is noticed: a frozen one is correct for the tasks that it was captured with
    "gradient": (Recorder(lambda r: r.grads["1.weight"].mul_(1.01)), 1, r"a replay's meta-gradient differed by 0\.0"),
    "nan": (Recorder(lambda r: r.grads["3.bias"].fill_(math.nan)), 1, "a replay's meta-gradient differed by nan"),
    "loss": (Recorder(lambda r: r.loss.mul_(2)), 1, "a replay's query loss differed by 1 "),
    "predictions": (Recorder(lambda r: r.predictions.zero_()), 1, "a replay's predictions differed by 1 "),
    "frozen": (Recorder(frozen=True), 2, "a replay's meta-gradient differed by"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_wrong_replay_is_never_used(what: str, model: Any, caplog: pytest.LogCaptureFixture) -> None:
    eager, theta = model
    recorder, replays, message = SPOILT[what]
    gradient = CUDAGraphMetaGradient(eager, CPU, record=recorder)
    for _ in range(4):
        assert_equals_eager(gradient, eager, theta, batch())
    assert recorder.replayed == replays
    assert caplog.record_tuples[1:] == []
    prefix = "WARNING .*run.cuda_graph: the meta-gradient is computed without a graph, as "
    assert re.match(prefix + message, caplog.text)


def broken_off(compute: Callable[[], MetaGradient], device: torch.device) -> Any:
    """Fail as torch.cuda.graph does: ending a capture that was broken off raises another error."""
    try:
        compute()
        raise RuntimeError("called a synchronizing CUDA operation")
    finally:
        raise torch.AcceleratorError("operation failed due to a previous error during capture")


def out_of_memory(compute: Callable[[], MetaGradient], device: torch.device) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory.\nMore lines.")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (broken_off, "recording it raised RuntimeError: called a synchronizing CUDA operation"),
        (out_of_memory, "recording it raised OutOfMemoryError: CUDA out of memory."),
    ],
)
def test_failed_capture_falls_back_to_eager(
    record: Any, reason: str, model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    eager, theta = model
    gradient = CUDAGraphMetaGradient(eager, CPU, record=record)
    for _ in range(3):
        assert_equals_eager(gradient, eager, theta, batch())
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.endswith(reason)


def test_graph_that_leaves_no_memory_is_dropped(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    eager, theta = model
    fails = iter([False, False, False, True, False, False])  # eager, captured, replayed; eager, eager again; eager

    def scarce(params: Params, episodes: Episodes) -> MetaGradient:
        if next(fails):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return eager(params, episodes)

    gradient = CUDAGraphMetaGradient(scarce, CPU, record=Recorder())
    for _ in range(3):
        assert_equals_eager(gradient, eager, theta, batch())
    assert not list(fails)
    assert "without a graph, as there is not enough memory beside it" in caplog.text


def test_nonfinite_results_are_not_compared(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    eager, theta = model
    recorder = Recorder()
    gradient = CUDAGraphMetaGradient(eager, CPU, record=recorder)
    spoilt = batch()
    spoilt.query_x[0, 0] = math.nan
    with defer_loss_checks():
        assert not gradient(theta, spoilt).loss.isfinite()
        assert recorder.recorded == 0
        for _ in range(3):
            assert_equals_eager(gradient, eager, theta, batch())
    assert recorder.replayed == 3
    assert not caplog.records


def test_capture_draws_no_random_numbers() -> None:
    eager, theta = eager_gradient(nn.Dropout(0.5))
    episodes, recorder = batch(), Recorder()
    torch.manual_seed(3)
    expected = [eager(theta, episodes).grads["1.weight"] for _ in range(4)]
    gradient = CUDAGraphMetaGradient(eager, CPU, record=recorder)
    torch.manual_seed(3)
    for one in expected:
        assert torch.equal(gradient(theta, episodes).grads["1.weight"], one)
    assert recorder.replayed == 4


def test_cuda_graph_on_a_cpu_warns_and_is_eager(caplog: pytest.LogCaptureFixture, model: Any) -> None:
    eager, _ = model
    assert with_cuda_graph(eager, CPU) is eager
    assert "run.cuda_graph=true: there is no GPU in use (run.device is cpu)" in caplog.text


def test_training_on_a_cpu_is_bitwise_equal(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    short = ["outer.iterations=3", "eval.every=3"]
    for name in ("true", "false"):
        train(train_config(*AT_VALIDATIONS, *short, f"run.cuda_graph={name}"), tmp_path / name)
    assert len([r for r in caplog.records if "run.cuda_graph" in r.getMessage()]) == 1
    assert_runs_equal(tmp_path / "true", tmp_path / "false")
    train(train_config(*AT_VALIDATIONS, *short, "run.resume=true"), tmp_path / "true")  # the key may differ


def test_auto_takes_a_graph_on_gpus_where_it_can_hold_every_meta_step() -> None:
    def uses_graph(*overrides: str, device: str = "cuda") -> bool:
        experiment = build_experiment(train_config(*SMALL, *overrides))
        return dataclasses.replace(experiment, device=torch.device(device)).uses_cuda_graph

    assert uses_graph()
    assert uses_graph("run.cuda_graph=auto")
    assert not uses_graph(device="cpu")
    assert not uses_graph("run.cuda_graph=false")
    assert uses_graph("run.cuda_graph=true", device="cpu"), "which warns"
    annealed = ("algorithm=maml_pp", "algorithm.per_step_affine=false", "algorithm.per_step_statistics=false")
    assert not uses_graph(*annealed)
    assert uses_graph(*annealed, "algorithm.multi_step_share=0", "algorithm.first_order_share=0")
    own = "tests.training.own_code:AdaGrad"
    assert not uses_graph("inner.optimizer=custom", f"inner.optimizer_target={own}")


def test_replaced_experiment_captures_its_own_graph() -> None:
    experiment = build_experiment(train_config(*SMALL))
    algorithm = dataclasses.replace(experiment.algorithm, inner=dataclasses.replace(experiment.inner, steps=0))
    other = dataclasses.replace(experiment, algorithm=algorithm)
    episodes = experiment.train.tasks(0, 2)
    assert len(experiment.meta_gradient(experiment.theta, episodes, 0).support_loss) == 1
    assert len(other.meta_gradient(experiment.theta, episodes, 0).support_loss) == 0


def test_graph_goes_with_its_experiment() -> None:
    experiment = build_experiment(train_config(*SMALL, "run.cuda_graph=true"))
    assert experiment._graph is not None
    gone = weakref.ref(experiment)
    gc.disable()  # a cycle would keep the graph's memory until it runs
    try:
        del experiment
        assert gone() is None
    finally:
        gc.enable()


class Branches(nn.Module):
    """Reads a value back, which a graph cannot do."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.ones((), device="cuda")

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.item()


@pytest.mark.gpu
def test_graph_equals_eager_on_a_gpu(caplog: pytest.LogCaptureFixture) -> None:
    small = [override for override in SMALL if not override.startswith(("model", "run.device"))]
    experiment = build_experiment(train_config(*small, "model.width=16", "run.device=cuda"))
    captured = []

    def capture_and_count(compute: Callable[[], MetaGradient], device: torch.device) -> Any:
        captured.append(device)
        return capture(compute, device)

    def eager(params: Params, episodes: Episodes) -> MetaGradient:
        return meta_gradient(experiment.forward, params, episodes, experiment.inner)

    gradient = CUDAGraphMetaGradient(eager, experiment.device, record=capture_and_count)
    with experiment.precision(), defer_loss_checks():
        for step in range(5):
            params, episodes = moved(experiment.theta, 0.01 * step), experiment.train.tasks(8 * step, 8)
            got, expected = gradient(params, episodes), eager(params, episodes)
            assert relative_error(got.grads, expected.grads) <= LARGEST_ERROR
            torch.testing.assert_close(got.loss, expected.loss, rtol=1e-4, atol=0)
    assert len(captured) == 1
    assert not caplog.records, "the graph is used"


@pytest.mark.gpu
def test_model_that_syncs_is_computed_eagerly_on_a_gpu(caplog: pytest.LogCaptureFixture) -> None:
    eager, theta = eager_gradient(Branches())
    theta = {name: p.cuda() for name, p in theta.items()}
    on_gpu = Episodes(*(t.cuda() for t in vars(batch()).values()))
    gradient = CUDAGraphMetaGradient(eager, on_gpu.query_x.device)
    with defer_loss_checks():
        for _ in range(3):
            got, expected = gradient(theta, on_gpu), eager(theta, on_gpu)
            assert relative_error(got.grads, expected.grads) <= LARGEST_ERROR
    assert "computed without a graph, as recording it raised" in caplog.text
