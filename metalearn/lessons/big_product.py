"""Apply the Hessian of ten million parameters in the memory of a few vectors; the matrix has 4 x 10^14 bytes.

    f(x) = sum_i (-cos x_i) + (sum_i x_i)^2 / 2n,      H = diag(cos x) + 1 1^T / n,      H v = cos(x) v + mean(v) 1

No entry of H is zero, so a sparse format could not hold it either.
"""

from __future__ import annotations

import time

import torch
from matplotlib.figure import Figure
from torch import Tensor

from metalearn.core.profiling.memory import PeakTensorMemory
from metalearn.derivatives import HVP_MODES, hvp
from metalearn.lessons.lesson import BLUE, GREY, VERMILION, Check, Lesson, error_message, panels, source_of

N = 10**7
_MAX_VECTORS = 12.0
"""Bound on the peak: 4 to 7 were measured, and another version of torch may need some more."""

_CLAIM = """\
A product with the Hessian takes the memory of a few vectors for any n. At n = 10^7 a float32 vector has 40 MB, and \
the matrix would have 4 x 10^14 bytes, 400 TB. Every entry of the product is compared with its formula.

Two mistakes with grad_outputs are common. After a gradient without create_graph=True, the second autograd.grad raises \
a RuntimeError; it returns neither zeros nor None. And with a graph, grad_outputs=ones gives neither the Hessian nor \
its diagonal but H 1, the sums of its rows, which is the diagonal only if all other entries are zero."""


def f(x: Tensor) -> Tensor:
    """Sum a function of every entry, and a square of the sum, which couples all entries."""
    return -x.cos().sum() + x.sum() ** 2 / (2 * x.numel())


def known_product(x: Tensor, v: Tensor) -> Tensor:
    """Compute H v by the formula, in float64: the diagonal part, and one number everywhere from the coupling."""
    x, v = x.double(), v.double()
    return x.cos() * v + v.mean()


def peak_of_product(x: Tensor, v: Tensor, mode: str) -> tuple[Tensor, float]:
    """Return H v, and the peak number of live vectors of its size, without x and v."""
    with PeakTensorMemory() as live:
        product = hvp(f, x, v, mode=mode)
    return product, live.peak / x.nbytes


def small(x: Tensor) -> Tensor:
    """Compute x1^2 x2 + x2 x3^2, with the Hessian [[2 x2, 2 x1, 0], [2 x1, 0, 2 x3], [0, 2 x3, 2 x2]]."""
    return x[0] ** 2 * x[1] + x[1] * x[2] ** 2


def with_ones(x: Tensor, *, create_graph: bool) -> Tensor:
    """Differentiate a gradient with ``grad_outputs=ones``."""
    (grads,) = torch.autograd.grad(small(x), x, create_graph=create_graph)
    (result,) = torch.autograd.grad(grads, x, grad_outputs=torch.ones_like(grads))
    return result


def lesson() -> Lesson:
    """Run the lesson."""
    draw = torch.Generator().manual_seed(0)
    x, v = torch.rand(N, generator=draw) * 6 - 3, torch.randn(N, generator=draw) + 1
    matrix = torch.empty(N, N, device="meta")  # shape and type without memory
    known, checks, notes, peaks = known_product(x, v), [], [], {}
    for mode in HVP_MODES:
        product, peaks[mode] = peak_of_product(x, v, mode)
        error = (product - known).abs().max().item()
        del product
        began = time.perf_counter()
        hvp(f, x, v, mode=mode)
        seconds = time.perf_counter() - began
        within = "yes" if peaks[mode] <= _MAX_VECTORS else f"{peaks[mode]:.1f} vectors"
        checks.append(Check(f"{mode}: largest error of an entry of H v", error, 0.0, 1e-5))
        checks.append(Check(f"{mode}: peak within {_MAX_VECTORS:.0f} vectors of 40 MB", within, "yes", source="bound"))
        notes.append(f"{mode}: {peaks[mode]:.1f} vectors ({peaks[mode] * x.nbytes / 1e6:,.0f} MB) and {seconds:.2f} s")
    return Lesson(
        title="The Hessian of ten million parameters, applied",
        claim=_CLAIM,
        code=source_of(f, known_product, peak_of_product, small, with_ones),
        checks=[Check("bytes of the matrix, n^2 x 4", float(matrix.nbytes), 4e14), *checks, *_ones()],
        notes=notes,
        plots={"big_product": _plot(peaks)},
    )


def _ones() -> list[Check]:
    """Check at (1, 2, 3), where H = [[4, 2, 0], [2, 0, 6], [0, 6, 4]]: row sums (6, 8, 10), diagonal (4, 0, 4)."""
    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    raised, named = error_message(lambda: with_ones(x, create_graph=False)), "RuntimeError, does not require grad"
    outcome = named if all(part in raised for part in named.split(", ")) else raised
    sums = zip(with_ones(x, create_graph=True).tolist(), (6.0, 8.0, 10.0), strict=True)
    return [
        Check("grad_outputs=ones on a gradient without a graph", outcome, named, source="observed"),
        *(Check(f"grad_outputs=ones with a graph, entry {i}", s, known, 1e-6) for i, (s, known) in enumerate(sums, 1)),
    ]


def _plot(peaks: dict[str, float]) -> Figure:
    figure, (axes,) = panels(1, width=8, height=2.8)
    sizes = {"x or v": 1.0, **{f"H v, {mode}": peak for mode, peak in peaks.items()}, "H as a matrix": float(N)}
    bars = axes.barh(list(sizes), [4 * N * size for size in sizes.values()], color=[GREY, BLUE, BLUE, BLUE, VERMILION])
    axes.bar_label(bars, ["40 MB", *(f"{40 * p:.0f} MB" for p in peaks.values()), "400 TB"], padding=4)
    axes.set(xscale="log", xlim=(1e7, 1e16), xlabel="peak memory [bytes], log scale", title="n = 10⁷ in float32")
    axes.invert_yaxis()
    return figure
