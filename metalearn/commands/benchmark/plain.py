"""Our meta-gradient as a plain library call: in a process of its own, as ``configure_malloc`` holds for all of one."""

from __future__ import annotations

import copy
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection

import torch
from torch import nn

from metalearn.commands.benchmark.measure import MetaStep
from metalearn.commands.benchmark.methods import OURS, PLAIN, DisagreementError, Method
from metalearn.core.functional import functionalize
from metalearn.core.params import relative_error
from metalearn.core.types import Episodes, Params
from metalearn.inner import InnerLoop
from metalearn.metagrad import meta_gradient

_TOLERANCE = 1e-3
"""For the same computation in float32: kinks of ReLU aside, it is the same within rounding."""


@contextmanager
def plain_methods(step: MetaStep) -> Iterator[list[Method]]:
    """Start the process, with a copy of the weights and tasks, and yield ``unroll`` in both orders, for timing alone.

    A call takes a message there and one back, some 0.1 ms; it ignores its arguments and returns nothing.

    Raises:
        DisagreementError: if that process fails, or computes another meta-gradient than this one.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    inner = replace(step.inner, engine="unroll")
    copies = copy.deepcopy((step.module, step.episodes))  # as they are moved to shared memory
    process = context.Process(target=_serve, args=(there, *copies, inner, torch.get_num_threads()), daemon=True)
    process.start()
    there.close()  # so that its end is noticed here

    def ask(second_order: bool, *, wants_gradient: bool) -> Params:
        try:
            here.send((second_order, wants_gradient))
            grads, error = here.recv()
        except (EOFError, OSError):
            process.join()
            grads, error = {}, f"it ended with exit code {process.exitcode}"
        if error:
            raise DisagreementError(f"{OURS} {PLAIN}: {error}; nothing was timed.")
        return grads

    def call(second_order: bool, module: nn.Module, episodes: Episodes) -> None:
        ask(second_order, wants_gradient=False)

    try:
        for order in (True, False):
            expected = meta_gradient(*functionalize(step.module), step.episodes, replace(inner, second_order=order))
            difference = relative_error(ask(order, wants_gradient=True), expected.grads)
            if not difference < _TOLERANCE:
                raise DisagreementError(
                    f"{OURS} {PLAIN}: its meta-gradient differs from this process's by {difference:.1e}, more than "
                    f"the tolerance of {_TOLERANCE:.0e}; nothing was timed."
                )
        yield [Method(OURS, PLAIN, order, partial(call, order)) for order in (True, False)]
    finally:
        process.terminate()
        process.join()


def _serve(connection: Connection, module: nn.Module, episodes: Episodes, inner: InnerLoop, threads: int) -> None:
    torch.set_num_threads(threads)
    while True:
        second_order, wants_gradient = connection.recv()
        try:
            result = meta_gradient(*functionalize(module), episodes, replace(inner, second_order=second_order))
        except Exception as error:
            connection.send(({}, f"{type(error).__name__}: {error}"))
        else:
            connection.send((result.grads if wants_gradient else {}, ""))
