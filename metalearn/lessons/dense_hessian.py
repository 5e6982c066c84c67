"""The dense Hessian takes n^2 numbers: it fits up to some 10^4 parameters, and 1,000 are few.

    f(x) = sum_i x_i^4 / 12 + (sum_i x_i)^2 / 2n,      H = diag(x^2) + 1 1^T / n,      bytes = 4 n^2 in float32

Two methods give the same matrix; hvp gives its products without it.
"""

from __future__ import annotations

import math
import timeit
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from metalearn.core.profiling.memory import PeakTensorMemory
from metalearn.derivatives import available_memory, hessian, hessian_bytes, hvp
from metalearn.lessons.lesson import BLUE, GREEN, GREY, VERMILION, Check, Lesson, panels, source_of

_SIZES = (10, 32, 100, 316, 1000, 3162, 10_000)
_ALWAYS_MEASURED_UP_TO = 1000
"""Sizes up to this one are measured however long they take, so that the checks do not depend on the time."""

_BUDGET_S = 3.0
"""Budget for one Hessian; a size that is predicted to take longer is left out."""

_CLAIM = """\
A dense Hessian grows as n^2, not exponentially: ten times the parameters take a hundred times the bytes. It is often \
said to be infeasible at n = 1,000. It has 1,000,000 entries there, which is 4,000,000 bytes in float32, and takes \
milliseconds. The limit is memory, near the size in the notes; beyond it hessian raises an error before it allocates \
anything, and names the alternatives.

While it is computed, memory peaks at twice the matrix, as hessian_bytes says: its rows, and a copy while they are \
concatenated. derivatives.hessian differentiates the gradient in batches of 64 rows; torch.autograd.functional.hessian \
goes row by row, with one backward pass each. Both give the same matrix. A product by hvp takes n numbers, not n^2."""


@dataclass(frozen=True)
class Measured:
    """One result: size n, bytes of the result, seconds, and the peak bytes of all tensors if measured."""

    n: int
    entries: int
    seconds: float
    peak: int | None


def quartic(x: Tensor) -> Tensor:
    """Compute a function whose Hessian is full and known."""
    return x.pow(4).sum() / 12 + x.sum().square() / (2 * x.numel())


def batched(x: Tensor) -> Tensor:
    """Compute 64 rows per pass."""
    return hessian(quartic, x)


def row_by_row(x: Tensor) -> Tensor:
    """Compute one row per backward pass."""
    return torch.autograd.functional.hessian(quartic, x)


def one_product(x: Tensor) -> Tensor:
    """Compute H 1, for comparison."""
    return hvp(quartic, x, torch.ones_like(x))


_ROUTES = {"hessian": batched, "row by row": row_by_row, "one hvp": one_product}


def lesson() -> Lesson:
    """Run the lesson."""
    measured = {name: _measure(route) for name, route in _ROUTES.items()}
    return Lesson(
        title="The dense Hessian and what it takes",
        claim=_CLAIM,
        code=source_of(quartic, batched, row_by_row, one_product),
        checks=[*_entries(), *_growth(measured), _memory_error()],
        notes=_notes(measured),
        plots={"dense_hessian": _plot(measured)},
    )


def _random_point(n: int) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(n)) + 0.5


def _measure(route: Callable[[Tensor], Tensor]) -> list[Measured]:
    """Measure a method at every size that fits the time budget and half of the free memory."""
    route(_random_point(4))  # torch's set-up on first use
    done: list[Measured] = []
    for n in _SIZES:
        x = _random_point(n)
        if n > _ALWAYS_MEASURED_UP_TO:
            predicted = done[-1].seconds * (n / done[-1].n) ** 2
            if predicted > _BUDGET_S or hessian_bytes(x) > available_memory(x.device) / 2:
                break
        entries = route(x).nbytes
        seconds = min(timeit.repeat(lambda x=x: route(x), number=1, repeat=3 if n <= _ALWAYS_MEASURED_UP_TO else 1))  # type: ignore[misc]
        done.append(Measured(n, entries, seconds, peak(route, x) if n <= _ALWAYS_MEASURED_UP_TO else None))
    return done


def peak(route: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Return the peak bytes of all tensors."""
    with PeakTensorMemory() as live:
        route(x)
    return int(live.peak)


def _entries() -> list[Check]:
    """Compare both methods at n = 1,000 with diag(x^2) + 1/n."""
    x = _random_point(1000)
    known = torch.diag(x.square()) + 1 / 1000
    return [
        Check(f"n = 1,000, {name}: largest error of an entry", (route(x) - known).abs().max().item(), 0.0, 1e-5)
        for name, route in (("hessian", batched), ("row by row", row_by_row))
    ]


def exponent(measured: list[Measured]) -> float:
    """Fit the p in bytes = c n^p by least squares in the logarithms."""
    return float(np.polyfit([math.log(m.n) for m in measured], [math.log(m.entries) for m in measured], 1)[0])


def _growth(measured: dict[str, list[Measured]]) -> list[Check]:
    x = _random_point(1000)
    at = {name: {m.n: m for m in found} for name, found in measured.items()}
    ratio = at["hessian"][1000].entries / at["hessian"][100].entries
    return [
        Check("n = 1,000: bytes of the matrix", at["hessian"][1000].entries, 4_000_000),
        Check("n = 1,000: peak over hessian_bytes", peak(batched, x) / hessian_bytes(x), 1.0, 0.25, "measured"),
        Check("n = 1,000: bytes of a product", at["one hvp"][1000].entries, 4_000),
        Check("bytes at n = 1,000 over bytes at n = 100", ratio, 100.0),
        *(
            Check(f"p in bytes = c n^p, {name}", exponent(measured[name]), p, 1e-9)
            for name, p in (("hessian", 2.0), ("row by row", 2.0), ("one hvp", 1.0))
        ),
    ]


def _memory_error() -> Check:
    """Check that n = 10^6 raises: the matrix has 4 TB, and needs twice that while it is computed."""
    named = "MemoryError that names hvp"
    try:
        hessian(quartic, torch.ones(10**6), memory_limit=2**40)
        outcome = "no error"
    except MemoryError as error:
        outcome = named if "Use hvp(" in str(error) else str(error)
    return Check("hessian at n = 10^6 with 1 TiB to use", outcome, named)


def _notes(measured: dict[str, list[Measured]]) -> list[str]:
    free = available_memory(torch.device("cpu"))
    largest = math.isqrt(free // hessian_bytes(torch.zeros(1)))
    notes = [
        f"{name}, n = {m.n:,}: {m.entries / 1e6:.3g} MB in {1000 * m.seconds:.3g} ms"
        for name, found in measured.items()
        for m in found
        if m.n >= _ALWAYS_MEASURED_UP_TO
    ]
    return [
        *notes,
        f"{free / 2**30:.0f} GiB are free here: by hessian_bytes, 8 n^2 in float32, that holds n = {largest:,} "
        f"({4 * largest**2 / 2**30:.0f} GiB for the matrix itself)",
    ]


def _plot(measured: dict[str, list[Measured]]) -> Figure:
    figure, (memory, clock) = panels(2, width=10, height=4.2)
    styles = {"hessian": (BLUE, "o-"), "row by row": (VERMILION, "s--"), "one hvp": (GREEN, "^-.")}
    for name, found in measured.items():
        colour, style = styles[name]
        peaks = {m.n: m.peak for m in found if m.peak}
        memory.loglog(list(peaks), list(peaks.values()), style, color=colour, label=f"{name}, peak")
        clock.loglog([m.n for m in found], [m.seconds for m in found], style, color=colour, label=name)
    span = np.array([10.0, 1e6])
    free = available_memory(torch.device("cpu"))
    memory.loglog(span, 4 * span**2, color=GREY, linewidth=1, label="the matrix, $4 n^2$ bytes")
    memory.axhline(free, color="black", linewidth=1, linestyle=":")
    memory.text(11, free * 1.3, "free memory of this machine", va="bottom")
    memory.set(xlabel="parameters $n$", ylabel="bytes", title="memory", ylim=(10, 1e14))
    clock.set(xlabel="parameters $n$", ylabel="seconds", title="time", xlim=(7, 2e4))
    memory.legend(frameon=False, loc="lower right")
    clock.legend(frameon=False)
    return figure
