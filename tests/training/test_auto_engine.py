"""``inner.engine=auto`` takes the fastest engine that fits, and raises if none does. Times are made up."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch

from metalearn import InnerLoop, functionalize
from metalearn.core.errors import ConfigError, RunError
from metalearn.core.profiling.memory import MIB, MemoryLimitError, peak_bytes
from metalearn.metagrad import ENGINES
from metalearn.models import MLP
from metalearn.training.auto_engine import MetaStepProblem, choose_engine
from tests.config.factories import train_config
from tests.factories import image_episodes

AUTO = InnerLoop(lr=0.1, steps=5, engine="auto")
CPU = torch.device("cpu")


@pytest.fixture
def problem() -> MetaStepProblem:
    forward, theta = functionalize(MLP(9, 3, hidden=(16, 16), batch_norm=False))  # activations outweigh the weights
    return MetaStepProblem(forward, theta, image_episodes(tasks=6, shots=60, size=3, dtype=torch.float32))


def peak_mib(problem: MetaStepProblem, inner: InnerLoop) -> float:
    return peak_bytes(lambda: problem.step(inner), CPU) / MIB


def test_chosen_engine_fits(problem: MetaStepProblem) -> None:
    unroll = peak_mib(problem, dataclasses.replace(AUTO, engine="unroll"))
    for share in (1.2, 0.4, 0.2):
        chosen = choose_engine(problem, AUTO, limit_mib=share * unroll)
        assert chosen.engine in ENGINES
        assert peak_mib(problem, chosen) <= share * unroll
        assert dataclasses.replace(chosen, engine="auto", task_chunk=None, checkpoint_every=1) == AUTO


@pytest.mark.parametrize("fast", ENGINES)
def test_fastest_engine_that_fits_is_chosen(
    fast: str, problem: MetaStepProblem, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(self: MetaStepProblem, inner: InnerLoop) -> float:
        in_parts = (inner.task_chunk or 0) % self.episodes.tasks
        return (1.0 if inner.engine == fast else 2.0) + inner.checkpoint_every + in_parts

    monkeypatch.setattr(MetaStepProblem, "seconds", seconds)
    chosen = choose_engine(problem, AUTO, limit_mib=1000)
    assert (chosen.engine, chosen.task_chunk, chosen.checkpoint_every) == (fast, problem.episodes.tasks, 1)
    tight = 0.5 * peak_mib(problem, dataclasses.replace(AUTO, engine="unroll"))  # the others take less
    assert choose_engine(problem, AUTO, limit_mib=tight).engine == (fast if fast != "unroll" else "checkpoint")


def test_largest_or_configured_chunk_is_chosen(problem: MetaStepProblem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MetaStepProblem, "seconds", lambda self, inner: 10 / (inner.task_chunk or 6))
    three = peak_mib(problem, dataclasses.replace(AUTO, engine="checkpoint", task_chunk=3))
    chosen = choose_engine(problem, AUTO, limit_mib=1.05 * three)
    assert chosen.task_chunk in (3, 4, 5)
    assert choose_engine(problem, dataclasses.replace(AUTO, task_chunk=2), limit_mib=1000).task_chunk == 2
    # Smaller ones are faster now.
    monkeypatch.setattr(MetaStepProblem, "seconds", lambda self, inner: inner.task_chunk or 6)
    assert choose_engine(problem, dataclasses.replace(AUTO, task_chunk=5), limit_mib=1000).task_chunk == 5


def test_error_names_a_limit_that_is_enough(problem: MetaStepProblem) -> None:
    message = r"no engine fits into 0\.0100 MiB; one task at a time takes .*run\.memory_limit"
    with pytest.raises(RunError, match=message) as caught:
        choose_engine(problem, AUTO, limit_mib=0.01)
    needed = float(str(caught.value).split("takes at least ")[1].split(" MiB")[0])
    assert choose_engine(problem, AUTO, limit_mib=1.01 * needed).task_chunk == 1
    with pytest.raises(RunError, match="no engine fits"):
        choose_engine(problem, AUTO, limit_mib=0.9 * needed)


def test_choose_engine_preserves_the_generator(problem: MetaStepProblem, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with caplog.at_level(logging.INFO):
        choose_engine(problem, AUTO, limit_mib=None)
    assert torch.equal(torch.rand(3), expected)
    assert "inner.engine=auto chose" in caplog.text


def test_peak_bytes_raises_at_the_limit() -> None:
    with pytest.raises(MemoryLimitError, match="more than 1 MiB"):
        peak_bytes(lambda: torch.zeros(2**20), CPU, limit=MIB)
    assert peak_bytes(lambda: torch.zeros(2**18), CPU, limit=MIB) == MIB


def test_auto_raises_with_deterministic() -> None:
    with pytest.raises(ConfigError, match=r"inner\.engine=auto with run\.deterministic=true.*name an engine"):
        train_config("data=glyphs", "inner.engine=auto", "run.deterministic=true")
