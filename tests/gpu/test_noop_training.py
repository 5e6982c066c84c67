"""Whole programs on a CUDA runtime that computes nothing: waits of a meta-step, graphs, choices and messages."""

from __future__ import annotations

from typing import Any

import pytest

from tests.gpu.conftest import OnNoop

TRAINING = """
import logging
import sys
from pathlib import Path
from metalearn.training import auto_engine, loop, trainer
from metalearn.training.runtime import cuda_graph
from metalearn.training.state import TrainState
from tests.config.factories import train_config

logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
SMALL = [
    *("data=glyphs", "data.classes=60", "run.device=cuda", "model.width=4", "task.meta_batch=4"),
    *("outer.iterations=6", "log.images=false", "log.curvature_every=null"),
    *("task.ways=3", "eval.every=6", "eval.episodes=4", "eval.validation_episodes=4", "log.every=100"),
    *("inner.steps=2", "inner.eval_steps=2"),
]
tolist = torch.Tensor.tolist
torch.Tensor.tolist = lambda tensor: [0] * len(tolist(tensor))  # memory holds whatever it held: nothing is not finite
TrainState.is_finite = lambda state: True
cuda_graph.global_norm = lambda tree: torch.ones(())
cuda_graph._difference = lambda got, expected: ""
waited = []


def counted(*args, **kwargs):
    waited.append(int(noop.noop_syncs()))  # since the last meta-step began
    noop.noop_reset()
    return update(*args, **kwargs)


update, loop.compute_meta_update = loop.compute_meta_update, counted


def train(*overrides, choose_kernels=lambda experiment, episodes: experiment):
    waited.clear()
    trainer.choose_kernels = choose_kernels
    with tempfile.TemporaryDirectory() as folder:
        trainer.train(train_config(*SMALL, *overrides), Path(folder))
    return waited[1:]  # of all meta-steps but the last, which ends in validation
"""

PROGRAM = """
import io
from dataclasses import replace
from metalearn.commands.benchmark import engines, run, sweeps
from metalearn.training.experiment import build_experiment
from tests.commands.benchmark.factories import config

found = {}
measured_choice = auto_engine.choose_kernels

# Waits of every meta-step.
waited_by = {engine: train(f"inner.engine={engine}", "run.cuda_graph=false") for engine in ("unroll", "adjoint")}
waited_by["in chunks"] = train("inner.engine=checkpoint", "inner.task_chunk=2", "run.cuda_graph=false")
waited_by["graph"] = train("inner.engine=adjoint")[2:]  # the first two compare the graph with the eager result
found["waits"] = waited_by

# A graph by default, and without one that differs.
found["graphs"] = kinds()["cudaGraphLaunch"]  # in the last meta-step
messages = io.StringIO()
logging.getLogger().addHandler(logging.StreamHandler(messages))
cuda_graph._difference = lambda got, expected: "it differs"
train()
found["graphs_that_differ"], found["messages"] = kinds()["cudaGraphLaunch"], messages.getvalue()

# The choice of kernels.
experiment = build_experiment(train_config(*SMALL))
episodes = experiment.train.tasks(0, 4)


def choose(with_kernels, without, error=0.01, given=experiment):
    times = {True: with_kernels, False: without}
    auto_engine._seconds_of_run = lambda experiment, episodes, kernels: times[kernels]
    auto_engine.relative_error = lambda got, expected: error
    return measured_choice(given, episodes).kernels_on_gpus


def fails(experiment, episodes, kernels):
    raise torch.OutOfMemoryError("out of memory")


deterministic = replace(experiment, config=train_config(*SMALL, "run.deterministic=true"))
found["kernels"] = dict(
    faster=choose(1.0, 1.1),
    hardly=choose(1.0, 1.04),
    differs=choose(1.0, 2.0, error=0.06),
    nan=choose(1.0, 2.0, error=float("nan")),
    on_a_cpu=choose(1.0, 2.0, given=replace(experiment, device=torch.device("cpu"))),
    deterministic=choose(1.0, 2.0, given=deterministic),
)
auto_engine._gradient = fails
found["kernels"]["out_of_memory"] = choose(1.0, 2.0)


# The precision of benchmarks.
class Stop(Exception):
    pass


def precision_within(command, module, name, *overrides):
    seen = []

    def stop(*args, **kwargs):
        seen.append(torch.backends.cudnn.conv.fp32_precision)
        raise Stop

    setattr(module, name, stop)
    with tempfile.TemporaryDirectory() as folder:
        try:
            command(config("run.device=cuda", "data=glyphs", "data.classes=50", *overrides), Path(folder))
        except Stop:
            return seen


found["precisions"] = dict(
    peers=precision_within(run.run_benchmark, run, "measure_case", "bench.setting=configured"),
    engines=precision_within(engines.run_engine_table, engines, "measure", "bench.kind=engines"),
    sweeps=precision_within(sweeps.run_sweeps, sweeps, "measure_sweep", "bench.kind=sweeps"),
    outside=[torch.backends.cudnn.conv.fp32_precision],
)
report(**found)
"""


@pytest.fixture(scope="module")
def reported(on_noop: OnNoop) -> dict[str, Any]:
    """Return what the program reports."""
    return on_noop(TRAINING + PROGRAM)


def test_a_meta_step_waits_at_most_twice(reported: dict[str, Any]) -> None:
    assert all(len(found) >= 3 for found in reported["waits"].values()), reported
    assert max(max(found) for found in reported["waits"].values()) <= 2, reported


def test_graphs_are_the_default_and_a_wrong_one_is_named(reported: dict[str, Any]) -> None:
    assert reported["graphs"] == 1
    assert reported["graphs_that_differ"] == 0
    assert reported["messages"].count("run.cuda_graph: the meta-gradient is computed without a graph, as it") == 1


def test_kernels_are_chosen_if_equal_and_faster(reported: dict[str, Any]) -> None:
    assert [name for name, chosen in reported["kernels"].items() if chosen] == ["faster"]


def test_every_kind_of_benchmark_computes_in_plain_float32(reported: dict[str, Any]) -> None:
    """Torch's default has convolutions in TF32."""
    found = dict(reported["precisions"])
    outside = found.pop("outside")
    assert found == {kind: ["ieee"] for kind in ("peers", "engines", "sweeps")}
    assert outside != ["ieee"]


def _error_of_training(on_noop: OnNoop, *overrides: str, gib: str) -> str:
    """Return the message of a training that ends with ``RunError`` on a GPU of so much memory."""
    program = f"""
from metalearn.core.errors import RunError
try:
    train(*{overrides})
except RunError as error:
    report(raised=str(error))
"""
    return str(on_noop(TRAINING + program, NOOP_GIB=gib)["raised"])


def test_out_of_memory_names_keys_and_estimates(on_noop: OnNoop) -> None:
    """The estimates need the memory that the failed meta-step had."""
    overrides = ("model.width=64", "task.meta_batch=16", "task.queries=10", "inner.steps=5")
    raised = _error_of_training(on_noop, *overrides, gib="0.4")
    first, *keys = raised.splitlines()
    assert "A meta-step takes about" in first, raised
    assert all("about" in line for line in keys[:3]), raised
    assert "run.cuda_graph=false" in keys[3], raised


def test_auto_engine_without_memory_says_so(on_noop: OnNoop) -> None:
    overrides = ("model.width=512", "task.meta_batch=2", "inner.engine=auto", "data.classes=30")
    assert "not even one task at a time fits" in _error_of_training(on_noop, *overrides, gib="0.1")
