"""The meta-gradient as one CUDA graph: its kernels are recorded once, and every later meta-step is a single launch.

    record:   g = meta_gradient(theta, tasks)          with theta and tasks in tensors that stay where they are
    replay:   theta, tasks <- what is asked for;  launch;  g is where it was

A meta-step of small tasks is thousands of kernels of some microseconds each, which the CPU cannot launch as fast as a
GPU runs them. Nothing on the host may depend on what the GPU computes, so that recording fails for models that branch
on values, and for the engines ``checkpoint`` and ``adjoint`` in second order, which compare losses and put random
states back on their way back. Then everything is computed as without a graph, and a warning says why.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from metalearn.core.functional import global_norm, relative_error
from metalearn.core.types import Episodes, MetaGradient, Params
from metalearn.inner.diagnostics import defer_loss_checks
from metalearn.metagrad.trajectory import Snapshot

log = logging.getLogger(__name__)

Gradient = Callable[[Params, Episodes], MetaGradient]
"""The meta-gradient at given parameters, of given tasks."""

CaptureFn = Callable[[Callable[[], MetaGradient], torch.device], tuple[Callable[[], None], MetaGradient]]
"""From a computation on tensors that stay where they are to what repeats it, and where its results then are."""

LARGEST_ERROR = 1e-4
"""Between a replay and the same without a graph, as |g - g_ref| / |g_ref|: rounding, where kernels add in any order."""

_WARM_UPS = 3
_NUM_VERIFIED = 2
"""Uses that are held against the same without a graph; the second has other parameters and tasks than the first."""


def with_cuda_graph(eager: Gradient, device: torch.device) -> Gradient:
    """The meta-gradient by a graph where there is a GPU; else as it was, with a warning.

    Args:
        eager: computes it; the shapes that it is first used with are those of the graph.
        device: where.
    """
    if device.type != "cuda":
        log.warning(
            "run.cuda_graph=true: there is no GPU in use (run.device is %s), so that the meta-gradient is computed "
            "without a graph.",
            device.type,
        )
        return eager
    return CUDAGraphMetaGradient(eager, device)


@dataclass(frozen=True, eq=False)
class _Graph:
    """What was recorded.

    Args:
        layout: of the tensors that it takes.
        params: they are read from here.
        episodes: likewise.
        results: they are found here.
        replay: repeats the computation.
    """

    layout: list[Any]
    params: Params
    episodes: Episodes
    results: MetaGradient
    replay: Callable[[], None]

    @torch.no_grad()
    def __call__(self, params: Params, episodes: Episodes) -> MetaGradient:
        """Gradients and predictions are overwritten by the next call; both losses are copies, as curves keep them."""
        torch._foreach_copy_(list(self.params.values()), list(params.values()))
        for mine, given in zip(_tensors(self.episodes), _tensors(episodes), strict=True):
            mine.copy_(given)
        self.replay()
        return replace(self.results, loss=self.results.loss.clone(), support_loss=self.results.support_loss.clone())


class CUDAGraphMetaGradient:
    """A meta-gradient that records itself when it is first used, and is replayed from then on.

    The first two uses are held against the same without a graph, whose result they return; a graph that differs is
    never used. Episodes or parameters of other shapes than the first are computed without it. The losses are not
    checked: see ``defer_loss_checks``.

    A graph keeps the memory of its intermediate results, which nothing else can use in between. torch's peak of
    allocated memory counts them while they are recorded, in the first meta-step, and not in replays.

    Args:
        eager: computes the meta-gradient; must not read any tensor's values.
        device: where.
        record: makes a graph.
    """

    def __init__(self, eager: Gradient, device: torch.device, *, record: CaptureFn | None = None) -> None:
        self._eager, self._device, self._record = eager, device, record or capture
        self._graph: _Graph | None = None
        self._to_prove = _NUM_VERIFIED
        self._given_up = False

    def __call__(self, params: Params, episodes: Episodes) -> MetaGradient:
        """As ``eager``; gradients and predictions are valid until the next call."""
        if self._given_up or (self._graph and self._graph.layout != _layout(params, episodes)):
            return self._eager(params, episodes)
        if self._graph and not self._to_prove:
            return self._graph(params, episodes)
        return self._proved(params, episodes)

    def _proved(self, params: Params, episodes: Episodes) -> MetaGradient:
        """The meta-gradient without a graph, against which one is held that is recorded if there is none yet."""
        start = Snapshot.of(0, params)
        expected = self._eager(params, episodes)
        if not 0 < global_norm(expected.grads).item() < math.inf:  # nothing to hold against; the next will do
            return expected
        try:
            with start.replay_rng():
                self._graph = self._graph or self._recorded(params, episodes)
            with start.replay_rng():
                fault = _difference(self._graph(params, episodes), expected)
        except Exception as raised:  # whatever it is, what comes out without a graph is right
            fault = _reason(raised)
        if fault:  # out here, as an error's trace would keep what was computed
            self._graph, self._given_up = None, True
            log.warning("run.cuda_graph=true: the meta-gradient is computed without a graph, as %s", fault)
        else:
            self._to_prove -= 1
        return expected

    def _recorded(self, params: Params, episodes: Episodes) -> _Graph:
        own = {name: p.detach().clone() for name, p in params.items()}
        tasks = Episodes(*(t.clone() for t in _tensors(episodes)))
        replay, results = self._record(lambda: self._eager(own, tasks), self._device)
        return _Graph(_layout(params, episodes), own, tasks, results, replay)


def capture(compute: Callable[[], MetaGradient], device: torch.device) -> tuple[Callable[[], None], MetaGradient]:
    """Record a computation as torch's documentation asks: warmed up and captured on one stream beside the default one.

    Args:
        compute: reads tensors that stay where they are, and gives its results in new ones.
        device: a GPU.

    Returns:
        What launches the graph on the current stream, and the results, which hold nothing before it was launched.

    Raises:
        RuntimeError: if it reads a value back, or does anything else that cannot be captured.
    """
    low, enabled = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
    uncached = torch.autocast("cuda", low, enabled, cache_enabled=False)  # a graph must not read what autocast frees
    with torch.cuda.device(device), uncached, defer_loss_checks():
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream), _forbid_sync():
            for _ in range(_WARM_UPS):
                compute()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: NCCL's own thread may look at its events meanwhile, where processes share a batch.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            results = compute()
    return graph.replay, results


@contextmanager
def _forbid_sync() -> Iterator[None]:
    """Inside, torch raises where it would wait for the GPU: a capture that such a wait breaks off spoils the generator.

    (Dropout then raises "Offset increment outside graph capture" from there on.)
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it does not see every wait
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _tensors(episodes: Episodes) -> list[Tensor]:
    return [getattr(episodes, f.name) for f in fields(episodes)]


def _layout(params: Params, episodes: Episodes) -> list[Any]:
    """Names, shapes, types and places, which a graph has for good."""
    tensors = [*params.values(), *_tensors(episodes)]
    return [list(params), [(t.shape, t.dtype, t.device) for t in tensors]]


def _difference(got: MetaGradient, expected: MetaGradient) -> str:
    """In what a replay is not what it must be; empty if it is."""
    for name, ours, theirs in (
        ("meta-gradient", got.grads, expected.grads),
        ("query loss", {"": got.loss}, {"": expected.loss}),
        ("predictions", {"": got.predictions}, {"": expected.predictions}),
    ):
        error = relative_error(ours, theirs)
        if not error <= LARGEST_ERROR:
            return f"a replay's {name} differed by {error:.2g} of the length ({LARGEST_ERROR:g} is allowed)"
    return ""


def _reason(error: BaseException) -> str:
    """What was raised first: where a capture fails, ending it raises once more."""
    while error.__context__ is not None and not error.__suppress_context__:
        error = error.__context__
    said = (str(error).strip().splitlines() or ["no reason given"])[0][:300]
    return f"recording it raised {type(error).__name__}: {said}"
