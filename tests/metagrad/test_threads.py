"""Threads of a program that share a model, or torch's forward mode and generators, get what one thread gets."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metalearn import Episodes, InnerLoop, functionalize, meta_gradient
from metalearn.core.threads import one_thread_at_a_time
from metalearn.derivatives import hvp, nth_derivative
from tests.threads import CALLS, in_threads

ENGINES = ("unroll", "checkpoint", "adjoint")


def network(*more: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), *more, nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)).double()


def tasks(number: int) -> Episodes:
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64, generator=generator)
    labels = torch.randint(3, (2, 4, 5), generator=generator)
    return Episodes(x[0], labels[0], x[1], labels[1])


def assert_same(threaded: list[Any], alone: list[Any]) -> None:
    torch.testing.assert_close(threaded, alone, rtol=0, atol=0)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("shared", [True, False], ids=["one model", "a model each"])
def test_meta_gradients_of_threads(engine: str, shared: bool, caplog: pytest.LogCaptureFixture) -> None:
    module = network()
    weights = {name: p.clone() for name, p in module.state_dict().items()}
    forward, theta = functionalize(module)
    inner = InnerLoop(lr=0.1, steps=3, engine=engine)

    def gradient(i: int) -> dict[str, Tensor]:
        own = forward if shared else functionalize(network())[0]
        scaled = {name: p * (1 + i / 10) for name, p in theta.items()}
        return meta_gradient(own, scaled, tasks(i), inner).grads

    assert_same(in_threads(gradient), [gradient(i) for i in range(CALLS)])
    torch.testing.assert_close(module.state_dict(), weights, rtol=0, atol=0)
    assert all(isinstance(p, nn.Parameter) for p in module.parameters())
    assert not caplog.records, "forward mode works in each thread"


def test_passes_of_plain_loops_in_threads() -> None:
    module = network()
    forward, theta = functionalize(module)

    def gradients(i: int) -> list[tuple[Tensor, ...]]:
        scaled = [(p * (1 + i / 10)).requires_grad_() for p in theta.values()]
        params, x = dict(zip(theta, scaled, strict=True)), tasks(i).support_x[0]
        results = []
        for _ in range(20):
            results.append(torch.autograd.grad(forward(params, x).square().sum(), scaled))
            assert_same(list(functionalize(module)[1].values()), list(theta.values()))
        return results

    assert_same(in_threads(gradients), [gradients(i) for i in range(CALLS)])


@pytest.mark.parametrize("mode", ["forward_over_reverse", "reverse_over_forward"])
def test_products_and_derivatives_of_threads(mode: str) -> None:
    x, v = torch.linspace(0.1, 2, 40, dtype=torch.float64).split(20)

    def derivatives(i: int) -> list[Tensor]:
        def f(x: Tensor) -> Tensor:
            return (x.sin() * x.exp() * (1 + i)).prod().log1p()

        return [
            *(hvp(f, x, v, mode=mode) for _ in range(10)),
            nth_derivative(torch.sin, x * (1 + i), 3, mode="forward"),
        ]

    assert_same(in_threads(derivatives), [derivatives(i) for i in range(CALLS)])


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("engine", ["checkpoint", "adjoint"])
def test_dropout_masks_are_drawn_again_in_threads(engine: str, every: int) -> None:
    """The meta-gradient compares each support loss with that of the replayed step, and raises where they differ."""
    forward, theta = functionalize(network(nn.Dropout(0.5)))
    inner = InnerLoop(lr=0.1, steps=4, engine=engine, checkpoint_every=every)
    in_threads(lambda i: meta_gradient(forward, theta, tasks(i), inner).loss)


def test_a_thread_waits_for_another_and_not_for_itself() -> None:
    entered, done = threading.Event(), []

    def other() -> None:
        entered.set()
        with one_thread_at_a_time():
            done.append("other")

    with one_thread_at_a_time(), one_thread_at_a_time():
        thread = threading.Thread(target=other)
        thread.start()
        assert entered.wait(10)
        done.append("first")
    thread.join(10)
    assert done == ["first", "other"]


def test_forked_process_does_not_wait_for_threads_that_it_lacks() -> None:
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with one_thread_at_a_time():
            held.set()
            release.wait(0.3)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(10)
    child = os.fork()
    if child == 0:
        signal.alarm(10)  # ends it if it waits
        with one_thread_at_a_time():
            os._exit(0)
    thread.join(10)
    assert os.waitpid(child, 0)[1] == 0
