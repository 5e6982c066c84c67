"""``run.precision``: compute in a lower precision, and check that its meta-gradient can be trusted.

    error(g, g_ref) = |g - g_ref| / |g_ref|        of the whole gradient as one vector

bfloat16 moves a meta-gradient by 0.3% to more than 100%, depending on the model. So the error is measured on the run's
first tasks, and compared with a null: the change of float32's own meta-gradient when the parameters are
perturbed by that rounding. Near kinks of ReLU a correct gradient changes fast, by 30 to 80% on conv4's first tasks, and
a precision that does no worse is fine: training moves the parameters further. An error of more than twice the null
comes from the computation; below 5% of the gradient neither matters. Where the null is as long as the gradient (20-way
conv4 before training), little can be checked but that the engine agrees with ``unroll``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from metalearn.config.compatibility import tf32_error
from metalearn.core.errors import ConfigError, NonFiniteError, RunError
from metalearn.core.params import relative_error
from metalearn.core.types import Episodes, Forward, Loss, Params
from metalearn.inner import InnerLoop
from metalearn.metagrad import Engine, meta_gradient

ENGINE_BOUND = 0.05
"""Largest error between engines in one precision; 0.02 was the most that was measured."""

_TIMES_NULL = 2.0
_NEGLIGIBLE = 0.05
"""Rounding errors below this may exceed twice the null: smooth models have a few thousandths of both."""

_NUM_PERTURBATIONS = 4
"""Perturbations, of which the largest effect counts: one alone may happen to move no input of ReLU across its kink."""

_TASKS = 2

_AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_EPS = {"tf32": 2.0**-10, **{name: torch.finfo(dtype).eps for name, dtype in _AUTOCAST.items()}}
_FIRST_WITH_TF32 = (8, 0)  # compute capability of Ampere; older GPUs silently multiply in float32


@contextmanager
def precision_context(precision: str, device: torch.device) -> Iterator[None]:
    """Compute in ``float32``, ``tf32``, ``bfloat16`` or ``float16`` within the context.

    On GPUs ``float32`` uses all its bits, also for what autocast leaves in float32: torch's default has cuDNN's
    convolutions in TF32. ``tf32`` rounds the factors of matrix products and convolutions, and adds in float32; on a
    CPU it is ``float32``.
    """
    low = _AUTOCAST.get(precision)
    autocast = torch.autocast(device.type, dtype=low, enabled=low is not None)
    is_cuda = device.type == "cuda"
    with fp32_matmul_precision("tf32" if precision == "tf32" else "ieee") if is_cuda else nullcontext(), autocast:
        yield


@contextmanager
def fp32_matmul_precision(bits: str) -> Iterator[None]:
    """Compute float32 matrix products and convolutions in ``"tf32"``, or with all bits (``"ieee"``)."""
    backends = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)  # type: ignore[attr-defined]  # made at run time
    before = [place.fp32_precision for place in backends]
    for place in backends:
        place.fp32_precision = bits
    try:
        yield
    finally:
        for place, value in zip(backends, before, strict=True):
            place.fp32_precision = value


def check_tf32_available(precision: str, device: torch.device) -> None:
    """Raise ``ConfigError`` if TF32 is asked for on a CPU, or on a GPU from before Ampere."""
    name = "a CPU" if device.type == "cpu" else str(device)
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= _FIRST_WITH_TF32:
            return
        name = torch.cuda.get_device_name(device)
    if error := tf32_error(precision, name):
        raise ConfigError(error)


@dataclass(frozen=True)
class PrecisionReport:
    """Errors of a meta-gradient in a lower precision.

    Args:
        engine_error: the configured engine against ``unroll``, both in that precision.
        rounding_error: the configured engine in that precision against ``unroll`` in float32.
        null_error: ``unroll`` in float32 at parameters perturbed by up to eps / 2 of themselves, the precision's
            rounding, against the same at the unperturbed parameters; the largest of four.
    """

    precision: str
    tasks: int
    engine_error: float
    rounding_error: float
    null_error: float

    @property
    def allowed(self) -> float:
        """Largest ``rounding_error`` allowed: twice the null, but at least 0.05."""
        return max(_TIMES_NULL * self.null_error, _NEGLIGIBLE)

    def __str__(self) -> str:
        return (
            f"{self.precision} on {self.tasks} tasks: rounding moves the meta-gradient by {self.rounding_error:.2g} of "
            f"its length ({self.allowed:.2g} is allowed), and the engine differs from unroll by "
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
    """Check that a precision moves the meta-gradient no further than its rounding explains, on the first two tasks.

    The random generators are restored, and every meta-gradient here draws the same numbers.

    Raises:
        RunError: if the engine does not agree with ``unroll`` in the same precision, or if rounding moves the
            meta-gradient by more than 5%, and more than twice as far as perturbing the parameters by that rounding.
    """
    few = episodes.split(_TASKS)[0]
    plain = dataclasses.replace(inner, engine="unroll")
    cuda = sorted({p.get_device() for p in theta.values() if p.is_cuda})

    def grads(inner: InnerLoop, precision: str, params: Params = theta) -> Params:
        with torch.random.fork_rng(devices=cuda), precision_context(precision, few.query_x.device):
            return meta_gradient(forward, params, few, inner, loss=loss, engine=engine).grads

    exact = grads(plain, "float32")
    try:
        rounded, same_rounding = grads(inner, precision), grads(plain, precision)
    except NonFiniteError as error:
        raise RunError(
            f"In {precision} the loss or its gradient is not finite, as both are in float32 ({error}). Set "
            "run.precision=float32."
        ) from error
    moved = [_perturb(theta, _EPS[precision], seed) for seed in range(_NUM_PERTURBATIONS)]
    report = PrecisionReport(
        precision,
        few.tasks,
        engine_error=relative_error(rounded, same_rounding),
        rounding_error=relative_error(rounded, exact),
        null_error=max(relative_error(grads(plain, "float32", params), exact) for params in moved),
    )
    _check_report(report, inner)
    return report


def _check_report(report: PrecisionReport, inner: InnerLoop) -> None:
    remedy = "Set run.precision=float32."
    if not report.engine_error <= ENGINE_BOUND:
        raise RunError(
            f"In {report.precision} the engine {inner.engine} and unroll differ by {report.engine_error:.2g} of the "
            f"meta-gradient's length, and they round alike to {ENGINE_BOUND:g}. {remedy}"
        )
    if not report.rounding_error <= report.allowed:
        raise RunError(
            f"In {report.precision} rounding moves the meta-gradient by {report.rounding_error:.2g} of its length, and "
            f"{report.allowed:.2g} is allowed: twice as far as float32's own moves where the parameters are moved by "
            f"that rounding ({report.null_error:.2g}), or {_NEGLIGIBLE:g}. {remedy}"
        )


def _perturb(theta: Params, eps: float, seed: int) -> Params:
    """Move each parameter by a random fraction of what rounding may do to it, which is eps / 2 of itself."""
    generator = torch.Generator().manual_seed(seed)
    parts = {name: torch.rand(p.shape, generator=generator).to(p) - 0.5 for name, p in theta.items()}
    return {name: p + eps * parts[name] * p for name, p in theta.items()}
