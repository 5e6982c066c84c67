"""What ``run.precision`` names, how a model computes in it, and whether its meta-gradient can be trusted.

    error(g, g_ref) = |g - g_ref| / |g_ref|        of the whole gradient as one vector

Rounding to 8 bits (bfloat16) is an error of 0.4% an operation, to 11 bits (TF32) one of 0.05%, and what becomes of it
in a meta-gradient is the model's affair: bfloat16's was measured between 0.3% and more than 100%. So it is measured on
the run's own first tasks. Second order differs from first order by the terms with the Hessians; where rounding moves
the gradient as far as leaving those terms out would, nothing is learned from them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.functional import cross_entropy

from metalearn.errors import ConfigError, NonFiniteLossError, RunError
from metalearn.inner import InnerLoop
from metalearn.metagrad import Engine, meta_gradient
from metalearn.params import relative_error
from metalearn.runs.checks import no_tf32
from metalearn.types import Episodes, Forward, Loss, Params

ENGINE_BOUND = 0.05
"""Between engines that round alike; 0.02 was the most that was measured."""

_SHARE = 0.5
"""Of the second-order term, and in first order of the gradient, that rounding may take."""

_NEGLIGIBLE = 0.05
"""A second-order term below this may drown: leaving it out would not matter much either."""

_TASKS = 2

_AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_FIRST_WITH_TF32 = (8, 0)  # compute capability of Ampere; older GPUs multiply in float32 and say nothing


@contextmanager
def computed_in(precision: str, device: torch.device) -> Iterator[None]:
    """Inside, models compute in a precision; what was set before is set again outside.

    On GPUs ``float32`` is all of it: torch alone has cuDNN's convolutions in TF32. So is what autocast leaves in
    float32. ``tf32`` rounds the factors of matrix products and convolutions, and adds in float32; on a CPU, which has
    none, it is ``float32``.

    Args:
        precision: ``float32``, ``tf32``, ``bfloat16`` or ``float16``.
        device: where the model is.
    """
    low = _AUTOCAST.get(precision)
    autocast = torch.autocast(device.type, dtype=low, enabled=low is not None)
    if device.type != "cuda":
        with autocast:
            yield
        return
    with products_on_gpus("tf32" if precision == "tf32" else "ieee"), autocast:
        yield


@contextmanager
def products_on_gpus(bits: str) -> Iterator[None]:
    """Matrix products and convolutions of float32 in ``"tf32"``, or in all bits (``"ieee"``)."""
    places = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)  # type: ignore[attr-defined]  # made at run time
    before = [place.fp32_precision for place in places]
    for place in places:
        place.fp32_precision = bits
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.fp32_precision = value


def refuse_missing_tf32(precision: str, device: torch.device) -> None:
    """Refuse to train in TF32 where there is none.

    Raises:
        ConfigError: if the device is a CPU, or a GPU from before Ampere.
    """
    if device.type != "cuda":
        fault = no_tf32(precision, "a CPU" if device.type == "cpu" else str(device))
    elif torch.cuda.get_device_capability(device) < _FIRST_WITH_TF32:
        fault = no_tf32(precision, torch.cuda.get_device_name(device))
    else:
        return
    if fault:
        raise ConfigError(fault)


@dataclass(frozen=True)
class PrecisionReport:
    """What a lower precision makes of a meta-gradient.

    Args:
        precision: such as ``bfloat16``.
        tasks: that it was measured on.
        engine_error: the configured engine against ``unroll``, both in that precision.
        rounding_error: the configured engine in that precision against ``unroll`` in float32.
        allowed: ``rounding_error`` must be smaller. In second order half of |g_first - g_second| / |g_second|, but at
            least 0.05; otherwise 0.5.
    """

    precision: str
    tasks: int
    engine_error: float
    rounding_error: float
    allowed: float

    def __str__(self) -> str:
        return (
            f"{self.precision} on {self.tasks} tasks: rounding moves the meta-gradient by {self.rounding_error:.2g} of "
            f"its length (below {self.allowed:.2g} is allowed), and the engine differs from unroll by "
            f"{self.engine_error:.2g} (up to {ENGINE_BOUND:g})"
        )


def check_precision(
    forward: Forward,
    theta: Params,
    episodes: Episodes,
    inner: InnerLoop,
    *,
    precision: str,
    loss: Loss = cross_entropy,
    engine: Engine | None = None,
) -> PrecisionReport:
    """Refuse a precision whose rounding drowns what is to be learned, on two tasks at most.

    The random generators are left as they were found, and every meta-gradient here draws the same numbers.

    Args:
        forward: pure model of one task.
        theta: meta-parameters, in float32.
        episodes: tasks of the run, of which the first two are taken.
        inner: the run's inner loop.
        precision: of the run, as ``computed_in`` takes it.
        loss: one task's mean loss.
        engine: the algorithm's own, if it has one.

    Returns:
        The errors and what they were held against.

    Raises:
        RunError: if the engine does not agree with ``unroll`` in the same precision, or if rounding moves the
            meta-gradient half as far as dropping the second order would, and by 5% or more (in first order: by half
            of its length).
    """
    few = episodes.split(_TASKS)[0]
    plain = dataclasses.replace(inner, engine="unroll")
    grads = partial(_grads, forward, theta, loss, engine)
    exact = grads(few, plain, "float32")
    try:
        rounded = grads(few, inner, precision)
        same_rounding = grads(few, plain, precision)
    except NonFiniteLossError as error:
        raise RunError(
            f"In {precision} the loss is not finite, as it is in float32 ({error}). Set run.precision=float32."
        ) from error
    allowed = _SHARE
    if inner.second_order and inner.steps > 0:
        first = grads(few, dataclasses.replace(plain, second_order=False), "float32")
        allowed = max(_SHARE * relative_error(first, exact), _NEGLIGIBLE)
    report = PrecisionReport(
        precision=precision,
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
            f"In {report.precision} the engine {inner.engine} and unroll differ by {report.engine_error:.2g} of the "
            f"meta-gradient's length, and they round alike to {ENGINE_BOUND:g}. {remedy}"
        )
    if not report.rounding_error < report.allowed:
        why = (
            "half of the gap between first order and second (or 0.05), so that much of the second-order term is drowned"
            if inner.second_order and inner.steps > 0
            else "half of it"
        )
        raise RunError(
            f"In {report.precision} rounding moves the meta-gradient by {report.rounding_error:.2g} of its length, and "
            f"less than {report.allowed:.2g} is allowed, {why}. {remedy}"
        )


def _grads(
    forward: Forward,
    theta: Params,
    loss: Loss,
    engine: Engine | None,
    episodes: Episodes,
    inner: InnerLoop,
    precision: str,
) -> Params:
    """The meta-gradient in a precision, from the generators' present state."""
    cuda = sorted({p.get_device() for p in theta.values() if p.is_cuda})
    with torch.random.fork_rng(devices=cuda), computed_in(precision, episodes.query_x.device):
        return meta_gradient(forward, theta, episodes, inner, loss=loss, engine=engine).grads
