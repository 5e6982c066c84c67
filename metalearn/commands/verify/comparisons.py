"""Compare every engine with independent references.

    |g - g_ref| / |g_ref|       with g_ref from unroll, a loop over tasks by plain autograd, other libraries, and in
                                first order
    g_ref = 1/T sum_t dL_query,t(theta_K,t)            the query gradients at the adapted weights

    <g, v>  and  (L(theta + h v) - L(theta - h v)) / 2h            in second order, with L the mean query loss

The first-order meta-gradient is not the gradient of the loss, so finite differences cannot check it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from metalearn.commands.verify.cases import Case, NumericSetting, VerificationProblem
from metalearn.core.params import grad_of, relative_error
from metalearn.core.profiling.hardware import one_thread
from metalearn.core.types import Params
from metalearn.derivatives.gradcheck import directional
from metalearn.inner import SGD
from metalearn.metagrad import ENGINES
from metalearn.metagrad.baselines import by_hand
from metalearn.metagrad.baselines.common import Baseline
from metalearn.training.runtime.precision import fp32_matmul_precision

ErrorFn = Callable[[Params], float]
"""Returns the relative error of a gradient."""

UNROLL, BY_HAND, ADAPTED, DIFFERENCES = "unroll", "by hand", "adapted weights", "differences"
ALL = "all"
"""Engine and reference of the single comparison of a case whose model or tasks could not be created."""

_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}
_DIFFERENCE_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4}
# At a kink of ReLU the inner gradient jumps, and with it the loss: a kink within h of theta spoils the difference at h.
# Over 12 seeds, all cases and K = 1, 2, 5 none failed; the largest error was 3e-8, at 1e-7 or 1e-8. The smallest h is
# for K = 20, where the third derivative of the loss is still visible at 1e-7.
_DIFFERENCE_STEPS = (1e-5, 1e-6, 1e-7, 1e-8, 1e-9)


@dataclass(frozen=True)
class Comparison:
    """The comparison of an engine with a reference: the relative error and the largest that is allowed.

    Args:
        seconds: time of the engine's meta-gradient.
        error: ``None`` if engine or reference raised, with the exception's ``message``.
    """

    case: str
    engine: str
    reference: str
    tolerance: float
    seconds: float
    error: float | None = None
    message: str | None = None

    @property
    def passed(self) -> bool:
        """True if the error is within the tolerance; NaN is not."""
        return self.error is not None and self.error <= self.tolerance


def tolerance(reference: str, dtype: torch.dtype) -> float:
    """Return the largest error allowed against a reference."""
    return (_DIFFERENCE_TOLERANCES if reference == DIFFERENCES else _TOLERANCES)[dtype]


def compare(case: Case, setting: NumericSetting, peers: Mapping[str, Baseline]) -> list[Comparison]:
    """Compare every engine with every reference of a case; an exception is reported as a failed comparison."""
    cuda = [setting.device] if setting.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), fp32_matmul_precision("ieee"), one_thread():
        created = _attempt(partial(VerificationProblem.create, case, setting))
        if created.value is None:
            limit = tolerance(UNROLL, setting.dtype)
            return [Comparison(case.name, ALL, ALL, limit, created.seconds, message=created.message)]
        problem = created.value
        measures = {name: _attempt(make) for name, make in references(problem, peers).items()}
        comparisons = []
        for engine in ENGINES:
            inner = case.inner(engine)
            result = _attempt(partial(problem.grads, inner))
            for name, measure in measures.items():
                if name != UNROLL or inner != case.reference_inner:  # not unroll with itself
                    comparisons.append(_compare(name, measure, engine, result, problem))
        return comparisons


def references(problem: VerificationProblem, peers: Mapping[str, Baseline]) -> dict[str, Callable[[], ErrorFn]]:
    """Return functions that each compute a reference once and return the error function against it."""
    case, setting = problem.case, problem.setting
    makers: dict[str, Callable[[], ErrorFn]] = {UNROLL: lambda: _error_against(problem.grads(case.reference_inner))}
    is_stochastic = case.model.is_stochastic
    if not case.second_order:
        makers[ADAPTED] = lambda: _error_against(query_gradient(problem))
    elif not case.model.stops_gradient and (not is_stochastic or setting.dtype == torch.float64):
        makers[DIFFERENCES] = lambda: central_differences(problem)
    if not is_stochastic and case.reference_inner.rule == SGD():
        others = {BY_HAND: by_hand.meta_gradient, **peers}
        makers |= {name: partial(_error_against_peer, peer, problem) for name, peer in others.items()}
    return makers


def query_gradient(problem: VerificationProblem) -> Params:
    """Return the first-order meta-gradient, 1/T sum_t dL_query,t at theta_K,t."""
    fast = {name: w.detach().requires_grad_() for name, w in problem.adapted(problem.theta).items()}
    grads = grad_of(problem.query_loss(fast), fast, create_graph=False)
    return {name: g.sum(dim=0) for name, g in grads.items()}


def central_differences(problem: VerificationProblem) -> ErrorFn:
    """Return the error against central differences of the loss, always in float64.

    The direction in each parameter is half along its gradient, for a slope above rounding, and half along noise. Every
    parameter gets the same length, so that none is hidden by one with a larger gradient.
    """
    exact = VerificationProblem.create(problem.case, dataclasses.replace(problem.setting, dtype=torch.float64))
    grads = exact.grads(exact.case.reference_inner)
    direction = {}
    for name, g in grads.items():
        noise = torch.randn_like(g)
        direction[name] = g / g.norm().clamp_min(1e-12) + noise / noise.norm()

    def loss(theta: Params) -> Tensor:
        return exact.query_loss(exact.adapted(theta))

    def error(grads: Params) -> float:
        double = {name: g.double() for name, g in grads.items()}
        return directional(loss, exact.theta, direction, gradient_at_x=double, steps=_DIFFERENCE_STEPS).error

    return error


def _error_against(expected: Params) -> ErrorFn:
    return lambda grads: relative_error(grads, expected)


def _error_against_peer(peer: Baseline, problem: VerificationProblem) -> ErrorFn:
    with sdpa_kernel(SDPBackend.MATH), _without_cudnn():  # fused attention and cuDNN's LSTM have no second derivative
        return _error_against(peer(problem.module, problem.episodes, problem.case.reference_inner).grads)


@contextmanager
def _without_cudnn() -> Iterator[None]:
    """Switch cuDNN off: ``cudnn.flags`` reads TF32 as well, and raises once ``fp32_precision`` of a part was set."""
    before = torch._C._get_cudnn_enabled()
    torch._C._set_cudnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_cudnn_enabled(before)


T = TypeVar("T")


@dataclass(frozen=True)
class _Attempt(Generic[T]):
    """The result of a computation: its value, or the exception as text."""

    seconds: float
    value: T | None = None
    message: str | None = None


def _attempt(compute: Callable[[], T]) -> _Attempt[T]:
    started = time.perf_counter()
    try:
        value = compute()
    except Exception as error:  # reported as a failed comparison; the others go on
        return _Attempt(time.perf_counter() - started, message=f"{type(error).__name__}: {error}")
    return _Attempt(time.perf_counter() - started, value)


def _compare(
    name: str, measure: _Attempt[ErrorFn], engine: str, result: _Attempt[Params], problem: VerificationProblem
) -> Comparison:
    limit, case = tolerance(name, problem.setting.dtype), problem.case.name
    if result.value is None or measure.value is None:
        message = result.message or f"the reference raised {measure.message}"
        return Comparison(case, engine, name, limit, result.seconds, message=message)
    error = _attempt(partial(measure.value, result.value))
    return Comparison(case, engine, name, limit, result.seconds, error.value, error.message)
