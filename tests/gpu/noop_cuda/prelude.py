"""Comes before every program that tests run on the no-op CUDA runtime."""

import ctypes
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable

import torch

from metalearn import Episodes, InnerLoop, MetaGradient, Params, functionalize, meta_gradient
from metalearn.core.types import Forward
from metalearn.inner.diagnostics import defer_loss_checks
from metalearn.models import Conv4

noop = ctypes.CDLL("libnoop.so")
noop.noop_syncs.restype = noop.noop_nodes.restype = ctypes.c_long
GPU = torch.device("cuda")


def problem(
    ways: int = 3, shots: int = 1, tasks: int = 4, width: int = 8, queries: int = 1
) -> tuple[Forward, Params, Episodes]:
    """Return conv4 on the GPU, its parameters, and tasks of 28 x 28 images."""
    forward, theta = functionalize(Conv4(ways, width=width).to(GPU))
    labels = torch.arange(ways, device=GPU)
    support_y, query_y = (labels.repeat_interleave(each).expand(tasks, -1) for each in (shots, queries))
    support_x, query_x = (torch.rand(*y.shape, 1, 28, 28, device=GPU) for y in (support_y, query_y))
    return forward, theta, Episodes(support_x, support_y, query_x, query_y)


def gradient(given: tuple[Forward, Params, Episodes], steps: int = 2, engine: str = "unroll") -> MetaGradient:
    """Return a meta-gradient without checks, as memory holds whatever it held."""
    with defer_loss_checks():
        return meta_gradient(*given, InnerLoop(lr=0.1, steps=steps, engine=engine))


def waits(compute: Callable[[], object]) -> int:
    """Return how often the second call waits for the GPU; the first starts libraries."""
    compute()
    torch.cuda.synchronize()
    noop.noop_reset()
    compute()
    return int(noop.noop_syncs())


def kinds() -> Counter[str]:
    """Return the launches since the last ``noop_reset``, by the name of the kernel or call."""
    with tempfile.NamedTemporaryFile("r") as file:
        noop.noop_dump(file.name.encode())
        lines = [line.split("\t") for line in file.read().splitlines()]
    return Counter({name: int(n) for n, name in lines if n.isdigit() and not name.startswith("trivial")})


def launches(compute: Callable[[], object]) -> int:
    """Return the kernels, copies and fills that the second call launches."""
    waits(compute)
    return kinds().total()


def report(**values: object) -> None:
    """Print the values for the test, and exit before torch tears down what does not exist."""
    print(json.dumps(values), flush=True)
    os._exit(0)
