"""Meta-gradients on a CUDA runtime that computes nothing: waits, captures, launches and memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from metalearn.algorithms import ALGORITHMS
from metalearn.metagrad import ENGINES
from tests.gpu.conftest import OnNoop

PROGRAM = """
import traceback
from metalearn.algorithms import ALGORITHMS
from metalearn.core.module_parts import module_parts
from metalearn.core.profiling.memory import peak_bytes
from metalearn.models import ContextConv4
from metalearn.models.kernels import kernels_on_gpus
from metalearn.training.runtime.cuda_graph import capture

given = problem()
_, _, tasks = given
peaks = [peak_bytes(lambda: gradient(given), GPU) for _ in range(3)]


def facts(compute):
    waited = waits(compute)
    replay, result = capture(compute, GPU)
    replay()
    return waited, noop.noop_nodes() > 100, *{str(g.device) for g in result.grads.values()}


def algorithm_gradient(name):
    module = (ContextConv4(3, width=8, context=4) if name == "cavia" else Conv4(3, width=8)).to(GPU)
    forward, params = functionalize(module)
    algorithm = ALGORITHMS[name](InnerLoop(lr=0.1, steps=2, second_order=name != "reptile"), module_parts(module))
    theta = algorithm.init(params)

    def compute():
        with defer_loss_checks():
            return algorithm.meta_gradient(forward, theta, tasks, progress=0.0)

    return compute


def conv4_launches(ways, steps):
    few, many = (problem(ways=ways, tasks=tasks, width=64) for tasks in (4, 32))
    with kernels_on_gpus():
        found = [launches(lambda: gradient(given, steps=steps)) for given in (few, many)]
        with kernels_on_gpus(False):
            off = launches(lambda: gradient(few, steps=steps))
    return dict(few=found[0], many=found[1], off=off, default=launches(lambda: gradient(few, steps=steps)))


try:
    gradient((*given[:2], Episodes(*(t.cpu() for t in vars(tasks).values()))))
except RuntimeError as error:
    two_devices = "".join(traceback.format_exception_only(error))
report(
    peaks=peaks,
    engines={engine: facts(lambda: gradient(given, engine=engine)) for engine in ("unroll", "checkpoint", "adjoint")},
    algorithms={name: facts(algorithm_gradient(name)) for name in ALGORITHMS},
    launches=[conv4_launches(5, 1), conv4_launches(20, 5)],
    two_devices=two_devices,
)
"""


@pytest.fixture(scope="module")
def reported(on_noop: OnNoop) -> dict[str, Any]:
    """Return what the program reports."""
    return on_noop(PROGRAM)


def test_every_engine_waits_for_nothing_and_can_be_captured(reported: dict[str, Any]) -> None:
    """A CUDA graph holds a meta-gradient for which the host waits at no point."""
    assert reported["engines"] == {engine: [0, True, "cuda:0"] for engine in ENGINES}


def test_every_algorithm_waits_for_nothing_and_can_be_captured(reported: dict[str, Any]) -> None:
    assert reported["algorithms"] == {name: [0, True, "cuda:0"] for name in ALGORITHMS}


def test_kernels_launch_few_operations_whatever_the_number_of_tasks(reported: dict[str, Any]) -> None:
    """At most as many as a prototype had; torch's layers launch 1,032 and 3,940."""
    for found, most in zip(reported["launches"], (705, 2604), strict=True):
        assert abs(found["many"] - found["few"]) <= 2, found  # a large sum clears a counter first
        assert max(found["many"], found["few"]) <= most, found


def test_kernels_are_not_used_on_gpus_unless_asked_for(reported: dict[str, Any]) -> None:
    for found in reported["launches"]:
        assert found["default"] == pytest.approx(found["off"], abs=2), found
        assert found["few"] < found["off"], found


def test_first_peak_is_that_of_every_other(reported: dict[str, Any]) -> None:
    first, *others = reported["peaks"]
    assert first == pytest.approx(others[0], rel=0.02)
    assert others[0] == pytest.approx(others[1], rel=0.02)


def test_tensors_of_two_devices_are_named_as_such(reported: dict[str, Any]) -> None:
    assert "Move the model, its parameters and the examples to one device" in reported["two_devices"]
    assert "one dtype" not in reported["two_devices"]


def test_operations_need_no_c_compiler(on_noop: OnNoop, tmp_path: Path) -> None:
    """Torch would build Triton's launcher for the outer products of a layer with one input."""
    (tmp_path / "empty").mkdir()
    reported = on_noop(
        """
from metalearn.models import MLP
from metalearn.training.experiment import resolve_device


def run():
    forward, theta = functionalize(MLP(1, 1, hidden=(8,), batch_norm=False).to(GPU))
    x, y = torch.rand(4, 5, 1, device=GPU), torch.rand(4, 5, 1, device=GPU)
    inner, mse = InnerLoop(lr=0.1, steps=1), torch.nn.functional.mse_loss
    with defer_loss_checks():
        meta_gradient(forward, theta, Episodes(x, y, x, y), inner, loss=mse)
    return ""


try:
    before = run()
except (RuntimeError, ValueError) as error:
    before = str(error)
resolve_device("cuda")
report(before=before, after=run())
""",
        PATH=str(tmp_path / "empty"),
    )
    assert "TORCH_DISABLE_NATIVE_JIT=1" in reported["before"]
    assert reported["after"] == ""
