"""Meta-gradients that must be the same, or near enough: relative errors, and whether mixed precision can be trusted.

    error(g, g_ref) = |g - g_ref| / |g_ref|        of the whole gradient as one vector

Rounding to 8 bits (bfloat16) is an error of 0.4% an operation, and what becomes of it in a meta-gradient is the model's
affair: it was measured between 0.3% and more than 100%. So it is measured on the run's own first tasks. Second order
differs from first order by the terms with the Hessians; where rounding moves the gradient as far as leaving those terms
out would, nothing is learned from them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from metalearn.errors import NonFiniteLossError, RunError
from metalearn.inner import InnerLoop
from metalearn.metagrad import meta_gradient
from metalearn.params import relative_error
from metalearn.types import Episodes, Forward, Params

ENGINE_BOUND = 0.05
"""Between engines that round alike; 0.02 was the most that was measured."""

_SHARE = 0.5
"""Of the second-order term, and in first order of the gradient, that rounding may take."""

_NEGLIGIBLE = 0.05
"""A second-order term below this may drown: leaving it out would not matter much either."""

_TASKS = 2


@dataclass(frozen=True)
class PrecisionReport:
    """What mixed precision makes of a meta-gradient.

    Args:
        dtype: of the autocast, such as ``bfloat16``.
        tasks: that it was measured on.
        engine_error: the configured engine against ``unroll``, both under autocast.
        rounding_error: the configured engine under autocast against ``unroll`` in float32.
        allowed: ``rounding_error`` must be smaller. In second order half of |g_first - g_second| / |g_second|, but at
            least 0.05; otherwise 0.5.
    """

    dtype: str
    tasks: int
    engine_error: float
    rounding_error: float
    allowed: float

    def __str__(self) -> str:
        return (
            f"{self.dtype} on {self.tasks} tasks: rounding moves the meta-gradient by {self.rounding_error:.2g} of its "
            f"length (below {self.allowed:.2g} is allowed), and the engine differs from unroll by "
            f"{self.engine_error:.2g} (up to {ENGINE_BOUND:g})"
        )


def check_precision(
    forward: Forward, theta: Params, episodes: Episodes, inner: InnerLoop, *, dtype: torch.dtype
) -> PrecisionReport:
    """Refuse mixed precision whose rounding drowns what is to be learned, on two tasks at most.

    The random generators are left as they were found, and every meta-gradient here draws the same numbers.

    Args:
        forward: pure model of one task.
        theta: meta-parameters, in float32.
        episodes: tasks of the run, of which the first two are taken.
        inner: the run's inner loop.
        dtype: of the autocast.

    Returns:
        The errors and what they were held against.

    Raises:
        RunError: if the engine does not agree with ``unroll`` under the same autocast, or if rounding moves the
            meta-gradient half as far as dropping the second order would, and by 5% or more (in first order: by half
            of its length).
    """
    few = episodes.split(_TASKS)[0]
    plain = dataclasses.replace(inner, engine="unroll")
    exact = _grads(forward, theta, few, plain, None)
    try:
        rounded = _grads(forward, theta, few, inner, dtype)
        same_rounding = _grads(forward, theta, few, plain, dtype)
    except NonFiniteLossError as error:
        raise RunError(
            f"In {_name(dtype)} the loss is not finite, as it is in float32 ({error}). Set run.precision=float32."
        ) from error
    allowed = _SHARE
    if inner.second_order and inner.steps > 0:
        first = _grads(forward, theta, few, dataclasses.replace(plain, second_order=False), None)
        allowed = max(_SHARE * relative_error(first, exact), _NEGLIGIBLE)
    report = PrecisionReport(
        dtype=_name(dtype),
        tasks=few.tasks,
        engine_error=relative_error(rounded, same_rounding),
        rounding_error=relative_error(rounded, exact),
        allowed=allowed,
    )
    _refuse(report, inner)
    return report


def _refuse(report: PrecisionReport, inner: InnerLoop) -> None:
    remedy = "Set run.precision=float32."
    if not report.engine_error <= ENGINE_BOUND:
        raise RunError(
            f"In {report.dtype} the engine {inner.engine} and unroll differ by {report.engine_error:.2g} of the "
            f"meta-gradient's length, and they round alike to {ENGINE_BOUND:g}. {remedy}"
        )
    if not report.rounding_error < report.allowed:
        why = (
            "half of the gap between first order and second (or 0.05), so that much of the second-order term is drowned"
            if inner.second_order and inner.steps > 0
            else "half of it"
        )
        raise RunError(
            f"In {report.dtype} rounding moves the meta-gradient by {report.rounding_error:.2g} of its length, and "
            f"less than {report.allowed:.2g} is allowed, {why}. {remedy}"
        )


def _grads(forward: Forward, theta: Params, episodes: Episodes, inner: InnerLoop, dtype: torch.dtype | None) -> Params:
    """The meta-gradient under autocast to ``dtype``, or without any, from the generators' present state."""
    device = episodes.query_x.device.type
    cuda = sorted({p.get_device() for p in theta.values() if p.is_cuda})
    with torch.random.fork_rng(devices=cuda), torch.autocast(device, dtype=dtype, enabled=dtype is not None):
        return meta_gradient(forward, theta, episodes, inner).grads


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
