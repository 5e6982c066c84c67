"""The meta-gradient as one CUDA graph: its kernels are captured once, and every later meta-step is a single launch.

    capture:  g = meta_gradient(theta, tasks)          with theta and tasks in static tensors
    replay:   copy theta, tasks into the static tensors;  launch;  read g from where it was

Nothing on the host may depend on values on the GPU, so capturing fails for models that branch on values. Then the
meta-gradient is computed without a graph, and a warning says why.
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

from metalearn.core.params import global_norm, relative_error
from metalearn.core.types import Episodes, MetaGradient, Params
from metalearn.inner.diagnostics import defer_loss_checks
from metalearn.metagrad.trajectory import StepCheckpoint

log = logging.getLogger(__name__)

Gradient = Callable[[Params, Episodes], MetaGradient]
"""Computes the meta-gradient at given parameters, of given tasks."""

CaptureFn = Callable[[Callable[[], MetaGradient], torch.device], tuple[Callable[[], None], MetaGradient]]
"""Turns a computation on static tensors into a function that repeats it, and the static tensors of its results."""

LARGEST_ERROR = 1e-4
"""Largest |g - g_ref| / |g_ref| of a replay against the eager result: kernels may add in any order."""

_WARM_UPS = 3
_NUM_VERIFIED = 2
"""First calls that are compared with the eager result; the second has other parameters and tasks than the first."""


def with_cuda_graph(eager: Gradient, device: torch.device) -> Gradient:
    """Return the meta-gradient by a CUDA graph of its first call's shapes; without a GPU ``eager``, with a warning."""
    if device.type != "cuda":
        log.warning(
            "run.cuda_graph=true: there is no GPU in use (run.device is %s), so the meta-gradient is computed "
            "without a graph.",
            device.type,
        )
        return eager
    return CUDAGraphMetaGradient(eager, device)


@dataclass(frozen=True, eq=False)
class _Graph:
    """A captured graph with its static inputs and results; ``layout`` is that of parameters and episodes."""

    layout: list[Any]
    params: Params
    episodes: Episodes
    results: MetaGradient
    replay: Callable[[], None]

    @torch.no_grad()
    def __call__(self, params: Params, episodes: Episodes) -> MetaGradient:
        """Launch the graph; gradients and predictions are valid until the next call, all else is copied."""
        torch._foreach_copy_(list(self.params.values()), list(params.values()))
        for static, value in zip(_tensors(self.episodes), _tensors(episodes), strict=True):
            static.copy_(value)
        self.replay()
        return replace(
            self.results,
            loss=self.results.loss.clone(),
            support_loss=self.results.support_loss.clone(),
            diagnostics={name: value.clone() for name, value in self.results.diagnostics.items()},
        )


class CUDAGraphMetaGradient:
    """A meta-gradient that is captured at its first call and replayed from then on.

    The first two calls compare the replay with the eager result, which they return; a graph that differs is never used.
    Episodes or parameters of other shapes than the first are computed eagerly. The losses are not checked: see
    ``defer_loss_checks``; ``eager`` must not read any tensor's values.

    A graph keeps the memory of its intermediate results, which nothing else can use in between. torch's peak of
    allocated memory counts them during the capture, in the first meta-step, and not in replays.
    """

    def __init__(self, eager: Gradient, device: torch.device, *, record: CaptureFn | None = None) -> None:
        self._eager, self._device, self._record = eager, device, record or capture
        self._graph: _Graph | None = None
        self._left_to_verify = _NUM_VERIFIED
        self._disabled = False

    def __call__(self, params: Params, episodes: Episodes) -> MetaGradient:
        """Return the meta-gradient; gradients and predictions are valid until the next call."""
        if self._disabled or (self._graph and self._graph.layout != _layout(params, episodes)):
            return self._eager(params, episodes)
        if self._graph and not self._left_to_verify:
            return self._graph(params, episodes)
        return self._verified(params, episodes)

    def _verified(self, params: Params, episodes: Episodes) -> MetaGradient:
        """Compute eagerly and compare with the graph, capturing it first if needed."""
        checkpoint = StepCheckpoint.of(0, params)
        try:
            expected = self._eager(params, episodes)
        except torch.OutOfMemoryError:
            if self._graph is None:
                raise
            expected = None
        if expected is None:  # the graph keeps what the eager computation needs
            self._disable("there is not enough memory beside it")
            return self._eager(params, episodes)
        if not 0 < global_norm(expected.grads).item() < math.inf:  # nothing to compare with; try at the next call
            return expected
        try:
            with checkpoint.replay_rng():
                self._graph = self._graph or self._capture(params, episodes)
            with checkpoint.replay_rng():
                problem = _difference(self._graph(params, episodes), expected)
        except Exception as raised:  # whatever it is, the eager result is correct
            problem = _reason(raised)
        if problem:  # out here, because a traceback would keep what was computed
            self._disable(problem)
        else:
            self._left_to_verify -= 1
        return expected

    def _disable(self, problem: str) -> None:
        self._graph, self._disabled = None, True
        log.warning("run.cuda_graph: the meta-gradient is computed without a graph, as %s", problem)

    def _capture(self, params: Params, episodes: Episodes) -> _Graph:
        static = {name: p.detach().clone() for name, p in params.items()}
        tasks = Episodes(*(t.clone() for t in _tensors(episodes)))
        replay, results = self._record(lambda: self._eager(static, tasks), self._device)
        return _Graph(_layout(params, episodes), static, tasks, results, replay)


def capture(compute: Callable[[], MetaGradient], device: torch.device) -> tuple[Callable[[], None], MetaGradient]:
    """Capture a computation as torch's documentation asks: warmed up and captured on one side stream.

    Return a function that launches the graph on the current stream, and the results, undefined before the first launch.
    Raise ``RuntimeError`` if the computation reads a value back, or does anything else that cannot be captured.
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
    """Have torch raise where it would wait for the GPU: a capture that a wait breaks off corrupts the generator.

    (Dropout then raises "Offset increment outside graph capture" from there on.)
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it warns that it does not see every wait
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _tensors(episodes: Episodes) -> list[Tensor]:
    return [getattr(episodes, f.name) for f in fields(episodes)]


def _layout(params: Params, episodes: Episodes) -> list[Any]:
    """Return names, shapes, dtypes and devices, which a graph cannot change."""
    tensors = [*params.values(), *_tensors(episodes)]
    return [list(params), [(t.shape, t.dtype, t.device) for t in tensors]]


def _difference(got: MetaGradient, expected: MetaGradient) -> str:
    """Describe how a replay differs from the eager result; empty if it does not."""
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
    """Describe the first error raised: when a capture fails, ending it raises another."""
    while error.__context__ is not None and not error.__suppress_context__:
        error = error.__context__
    message = (str(error).strip().splitlines() or ["no reason given"])[0][:300]
    return f"recording it raised {type(error).__name__}: {message}"
