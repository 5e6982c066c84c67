"""The plain call runs in a process of its own, and is timed only if it computes the same."""

from __future__ import annotations

import multiprocessing

import pytest
from torch import Tensor, nn

from metalearn import InnerLoop
from metalearn.commands.benchmark import plain
from metalearn.commands.benchmark.measure import MetaStep
from metalearn.commands.benchmark.methods import DisagreementError
from tests.metagrad.settings import vectors


class Elsewhere(nn.Linear):
    """Fails, or computes something else, in other processes than the first."""

    fails = False

    def forward(self, x: Tensor) -> Tensor:
        if multiprocessing.parent_process() is None:
            return super().forward(x)
        if self.fails:
            raise ArithmeticError("not here")
        return super().forward(2 * x)


def step_of(module: nn.Module) -> MetaStep:
    return MetaStep(module.double(), vectors(), InnerLoop(0.1, 2))


def test_methods_are_called_in_both_orders() -> None:
    step = step_of(nn.Linear(4, 3))
    with plain.plain_methods(step) as methods:
        assert [method.second_order for method in methods] == [True, False]
        for method in methods:
            method.step(step.module, step.episodes)


def test_another_gradient_is_not_timed() -> None:
    with pytest.raises(DisagreementError, match=r"metalearn unroll, plain: its meta-gradient differs .* by"):  # noqa: SIM117
        with plain.plain_methods(step_of(Elsewhere(4, 3))):
            pass


def test_failure_is_told() -> None:
    module = Elsewhere(4, 3)
    module.fails = True
    with pytest.raises(DisagreementError, match="ArithmeticError: not here"), plain.plain_methods(step_of(module)):
        pass


def test_end_of_the_process_is_told() -> None:
    step = step_of(nn.Linear(4, 3))
    with plain.plain_methods(step) as (second_order, _):
        multiprocessing.active_children()[0].kill()
        with pytest.raises(DisagreementError, match="it ended with exit code -9"):
            second_order.step(step.module, step.episodes)
