"""Every engine held against what it must equal.

    |g - g_ref| / |g_ref|                              against unroll, other libraries, and in first order against
    g_ref = 1/T sum_t dL_query,t(theta_K,t)            the query gradients at the adapted weights

    <g, v>  against  (L(theta + h v) - L(theta - h v)) / 2h        in second order, with L the mean query loss

First order is not the gradient of the loss, so it has no central differences; hence its own truth.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from metalearn.commands.verify.cases import Case, NumericSetting, VerificationProblem
from metalearn.core.functional import grad_of, relative_error
from metalearn.core.profiling.hardware import one_thread
from metalearn.core.types import Episodes, MetaGradient, Params
from metalearn.derivatives.gradcheck import directional
from metalearn.inner import InnerLoop
from metalearn.metagrad import ENGINES
from metalearn.training.runtime.precision import fp32_matmul_precision

Peer = Callable[[nn.Module, Episodes, InnerLoop], MetaGradient]
ErrorFn = Callable[[Params], float]
"""The error of a gradient."""

UNROLL, ADAPTED, DIFFERENCES = "unroll", "adapted weights", "differences"
ALL = "all"
"""Engine and reference of the one comparison that stands for a case whose model or tasks could not be made."""

_BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-4}
_BOUNDS_OF_DIFFERENCES = {torch.float64: 1e-6, torch.float32: 1e-4}
# At a kink of ReLU the inner gradient jumps, and with it the loss: one within h of theta spoils the difference at h. Of
# 12 seeds, all cases and K = 1, 2, 5 none failed; the largest error was 3e-8, at 1e-7 or 1e-8. The smallest h is for
# K = 20, where the loss bends so much that at 1e-7 its third derivative still shows.
_DIFFERENCE_STEPS = (1e-5, 1e-6, 1e-7, 1e-8, 1e-9)


@dataclass(frozen=True)
class Comparison:
    """An engine held against a reference.

    Args:
        case: its name.
        engine: that was tried.
        reference: that it must equal.
        bound: the largest error allowed.
        seconds: that the engine's meta-gradient took.
        error: relative; ``None`` if something raised.
        message: what it said.
    """

    case: str
    engine: str
    reference: str
    bound: float
    seconds: float
    error: float | None = None
    message: str | None = None

    @property
    def holds(self) -> bool:
        """The verdict; NaN is within no bound."""
        return self.error is not None and self.error <= self.bound


def tolerance(reference: str, dtype: torch.dtype) -> float:
    """The largest error allowed against a reference."""
    return (_BOUNDS_OF_DIFFERENCES if reference == DIFFERENCES else _BOUNDS)[dtype]


def compare(case: Case, setting: NumericSetting, peers: Mapping[str, Peer]) -> list[Comparison]:
    """Hold every engine against every reference of a case; whatever raises is a comparison that fails.

    Args:
        case: what is computed.
        setting: where.
        peers: the other libraries that are installed.
    """
    cuda = [setting.device] if setting.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), fp32_matmul_precision("ieee"), one_thread():
        posed = _attempt(partial(VerificationProblem.pose, case, setting))
        if posed.value is None:
            return [
                Comparison(case.name, ALL, ALL, tolerance(UNROLL, setting.dtype), posed.seconds, None, posed.message)
            ]
        problem = posed.value
        measures = {name: _attempt(make) for name, make in references(problem, peers).items()}
        found = []
        for engine in ENGINES:
            inner = case.inner(engine)
            got = _attempt(partial(problem.grads, inner))
            for name, measure in measures.items():
                if name != UNROLL or inner != case.plain:
                    found.append(_compare(name, measure, engine, got, problem))
        return found


def references(problem: VerificationProblem, peers: Mapping[str, Peer]) -> dict[str, Callable[[], ErrorFn]]:
    """What the engines must equal; each is computed once, and then tells the error of any gradient."""
    found: dict[str, Callable[[], ErrorFn]] = {UNROLL: lambda: _equals(problem.grads(problem.case.plain))}
    random = problem.case.subject.random
    if not problem.case.second_order:
        found[ADAPTED] = lambda: _equals(query_gradient(problem))
    elif not problem.case.subject.stopped and (not random or problem.setting.dtype == torch.float64):
        found[DIFFERENCES] = lambda: central_differences(problem)
    if not random:
        found |= {name: partial(_equals_peer, peer, problem) for name, peer in peers.items()}
    return found


def query_gradient(problem: VerificationProblem) -> Params:
    """1/T sum_t dL_query,t at theta_K,t: the first-order meta-gradient."""
    at = {name: w.detach().requires_grad_() for name, w in problem.adapted(problem.theta).items()}
    grads = grad_of(problem.query_loss(at), at, create_graph=False)
    return {name: g.sum(dim=0) for name, g in grads.items()}


def central_differences(problem: VerificationProblem) -> ErrorFn:
    """Central differences of the loss, always in float64: of the problem or of a copy of it."""
    exact = VerificationProblem.pose(problem.case, dataclasses.replace(problem.setting, dtype=torch.float64))
    grads = exact.grads(exact.case.plain)
    direction = {name: _along_both(g, torch.randn_like(g)) for name, g in grads.items()}

    def loss(theta: Params) -> Tensor:
        return exact.query_loss(exact.adapted(theta))

    def error(got: Params) -> float:
        double = {name: g.double() for name, g in got.items()}
        return directional(loss, exact.theta, direction, gradient_at_x=double, steps=_DIFFERENCE_STEPS).error

    return error


def _along_both(grad: Tensor, noise: Tensor) -> Tensor:
    """A direction in one parameter: half along its gradient, for a slope above rounding, and half along noise.

    Every parameter gets the same length, so that none is lost beside the one with the largest gradient.
    """
    direction: Tensor = grad / grad.norm().clamp_min(1e-12) + noise / noise.norm()
    return direction


def _equals(expected: Params) -> ErrorFn:
    return lambda got: relative_error(got, expected)


def _equals_peer(peer: Peer, problem: VerificationProblem) -> ErrorFn:
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        grads = peer(problem.module, problem.episodes, problem.case.plain).grads
    return _equals(grads)


T = TypeVar("T")


@dataclass(frozen=True)
class _Attempt(Generic[T]):
    """What came of a computation: its value, or what it raised."""

    seconds: float
    value: T | None = None
    message: str | None = None


def _attempt(compute: Callable[[], T]) -> _Attempt[T]:
    started = time.perf_counter()
    try:
        value = compute()
    except Exception as error:  # not mended but reported, as a comparison that fails: the others must not be lost
        return _Attempt(time.perf_counter() - started, message=f"{type(error).__name__}: {error}")
    return _Attempt(time.perf_counter() - started, value)


def _compare(
    name: str, measure: _Attempt[ErrorFn], engine: str, got: _Attempt[Params], problem: VerificationProblem
) -> Comparison:
    limit, case = tolerance(name, problem.setting.dtype), problem.case.name
    if got.value is None or measure.value is None:
        message = got.message or f"the reference raised {measure.message}"
        return Comparison(case, engine, name, limit, got.seconds, message=message)
    measured = _attempt(partial(measure.value, got.value))
    return Comparison(case, engine, name, limit, got.seconds, measured.value, measured.message)
