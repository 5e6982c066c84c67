"""Our meta-gradient as a plain library call: in a process of its own, as ``configure_malloc`` holds for all of one."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection

import torch
from torch import nn

from metalearn.commands.benchmark.measure import MetaStep
from metalearn.commands.benchmark.methods import OURS, PLAIN, Method
from metalearn.core.functional import functionalize
from metalearn.core.types import Episodes
from metalearn.metagrad import meta_gradient


@contextmanager
def plain_methods(step: MetaStep) -> Iterator[list[Method]]:
    """Start the process, with a copy of the weights and tasks, and yield ``unroll`` in both orders, for timing alone.

    A call takes a message there and one back, some 0.1 ms; it ignores its arguments and returns nothing.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    inputs = pickle.dumps((step.module, step.episodes, replace(step.inner, engine="unroll"), torch.get_num_threads()))
    process = context.Process(target=_serve, args=(there, inputs), daemon=True)
    process.start()
    there.close()  # so that its end is noticed here

    def call(second_order: bool, module: nn.Module, episodes: Episodes) -> None:
        here.send(second_order)
        here.recv()

    try:
        yield [Method(OURS, PLAIN, order, partial(call, order)) for order in (True, False)]
    finally:
        process.terminate()
        process.join()


def _serve(connection: Connection, inputs: bytes) -> None:
    module, episodes, inner, threads = pickle.loads(inputs)
    torch.set_num_threads(threads)
    while True:
        second_order = connection.recv()
        meta_gradient(*functionalize(module), episodes, replace(inner, second_order=second_order))
        connection.send(None)
