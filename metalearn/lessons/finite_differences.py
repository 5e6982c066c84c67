"""Finite differences have a best step: larger steps err by higher derivatives, smaller ones by rounding.

    (f(x + h) - f(x)) / h:          error ~ h |f''| / 2     + 2 eps |f| / h        best h ~ eps^(1/2)
    (f(x + h) - f(x - h)) / 2h:     error ~ h^2 |f'''| / 6  +   eps |f| / h        best h ~ eps^(1/3)
    (f(x + h) - 2 f(x) + f(x - h)) / h^2:                      4 eps |f| / h^2     best h ~ eps^(1/4)

For a second derivative, a difference of autograd's gradients is far better than a second difference of values.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from metalearn.derivatives import gradient, hvp
from metalearn.derivatives.gradcheck import directional
from metalearn.lessons.lesson import BLUE, VERMILION, Check, Lesson, panels, source_of, value_or_error

STEPS = tuple(10 ** (-k / 4) for k in range(2, 57))  # 0.3 to 1e-14

_CLAIM = """\
A finite difference has two errors. Truncation falls with the step h, as h for a forward and h^2 for a central \
difference; rounding grows as eps/h, because two nearly equal numbers are subtracted. The best step is where they are \
equal: near eps^(1/2) and eps^(1/3), with relative errors near eps^(1/2) and eps^(2/3). In float64 that is 1e-8 and \
4e-11; in float32, 3e-4 and 2e-5. "The smaller h, the better" is wrong, and a good step in float64 is a bad one in \
float32.

For a second derivative, take the central difference of autograd's gradient: its best error is that of a first \
derivative. A second difference of values subtracts twice and divides by h^2, which leaves eps^(1/2).

Four common ways to break a check of gradients, with the numbers that they give: a step below the spacing of the \
floats, where x + h == x and every derivative is 0; shifting the same array in place for both sides, so that both \
sides are one array and the difference is 0; dividing the central difference by h instead of 2h, which doubles it; and \
torch.autograd.gradcheck on float32 inputs, whose default step of 1e-6 rejects a correct gradient."""


class Method(NamedTuple):
    """A difference formula, and its predicted errors on f = exp."""

    name: str
    estimate: Callable[[Tensor, float], Tensor]  # from x and h to exp(x), which is its own derivative of every order
    order: int  # p of the truncation error, which falls as h^p
    rounding: int  # q of the rounding error, which grows as eps / h^q
    best: Callable[[float], float]  # from eps to the step where the two are equal, about eps^(1 / (p + q))


def forward(x: Tensor, h: float) -> Tensor:
    """Return the first derivative of exp, relative error h/2."""
    return (torch.exp(x + h) - torch.exp(x)) / h


def central(x: Tensor, h: float) -> Tensor:
    """Return the first derivative of exp, relative error h^2/6."""
    return (torch.exp(x + h) - torch.exp(x - h)) / (2 * h)


def second(x: Tensor, h: float) -> Tensor:
    """Return the second derivative of exp from three values, relative error h^2/12."""
    return (torch.exp(x + h) - 2 * torch.exp(x) + torch.exp(x - h)) / h**2


def of_gradients(x: Tensor, h: float) -> Tensor:
    """Return the second derivative of exp from two gradients of sum exp, relative error h^2/6."""
    up, down = (gradient(lambda z: torch.exp(z).sum(), x + step) for step in (h, -h))
    return (up - down) / (2 * h)


METHODS = (
    Method("forward", forward, 1, 1, lambda eps: 2 * eps ** (1 / 2)),
    Method("central", central, 2, 1, lambda eps: (3 * eps) ** (1 / 3)),
    Method("second difference", second, 2, 2, lambda eps: (48 * eps) ** (1 / 4)),
    Method("difference of gradients", of_gradients, 2, 1, lambda eps: (3 * eps) ** (1 / 3)),
)
_DTYPES = {"float64": torch.float64, "float32": torch.float32}
Curves = dict[tuple[str, str], list[float]]


def errors(method: Method, dtype: torch.dtype) -> list[float]:
    """Return the root mean square of the relative error over 256 points in [1, 2], for each step."""
    # At one point the two errors can cancel by chance; over many points they do not.
    x = (torch.rand(256, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1).to(dtype)
    known = torch.exp(x.double())
    return [(method.estimate(x, h).double() / known - 1).square().mean().sqrt().item() for h in STEPS]


def power(curve: list[float], smallest: float, largest: float) -> float:
    """Fit the p in error = c h^p between two steps by least squares in the logarithms."""
    within = [(h, error) for h, error in zip(STEPS, curve, strict=True) if smallest <= h <= largest]
    log_h, log_error = np.log(np.array(within)).T
    return float(np.polyfit(log_h, log_error, 1)[0])


def lesson() -> Lesson:
    """Run the lesson."""
    curves = {(m.name, kind): errors(m, dtype) for m in METHODS for kind, dtype in _DTYPES.items()}
    return Lesson(
        title="Finite differences, and where they end",
        claim=_CLAIM,
        code=source_of(forward, central, second, of_gradients, too_small, aliased, halved),
        checks=[*_optima(curves), *_powers(curves), *_product(), *_broken(), *_directional()],
        notes=[
            f"{name}, {kind}: best step {STEPS[int(np.argmin(curve))]:.0e}, relative error {min(curve):.0e} there"
            for (name, kind), curve in curves.items()
        ],
        plots={"finite_differences": _plot(curves)},
    )


def _optima(curves: Curves) -> list[Check]:
    checks = []
    for method in METHODS:
        for kind, dtype in _DTYPES.items():
            curve, eps = curves[method.name, kind], torch.finfo(dtype).eps
            step = STEPS[int(np.argmin(curve))] / method.best(eps)
            error = min(curve) / eps ** (method.order / (method.order + method.rounding))
            name = f"{method.name}, {kind}: log10 of the"
            checks += [
                Check(f"{name} best step over the foreseen one", float(np.log10(step)), 0.0, 1.0, "error model"),
                Check(f"{name} smallest error over the foreseen one", float(np.log10(error)), 0.0, 1.0, "error model"),
            ]
    return checks


def _powers(curves: Curves) -> list[Check]:
    """Check the slopes on both sides of the best step in float64, which has room for both."""
    checks = []
    for method in METHODS:
        curve, best = curves[method.name, "float64"], method.best(torch.finfo(torch.float64).eps)
        large, small = power(curve, 10 * best, 0.2), power(curve, 1e-4 * best, 0.1 * best)
        checks += [
            Check(f"{method.name}: p in error = c h^p, large steps", large, method.order, 0.1, "truncation"),
            Check(f"{method.name}: p in error = c h^p, small steps", small, -method.rounding, 0.3, "rounding"),
        ]
    return checks


def _product() -> list[Check]:
    """Check H v of log sum exp, diag(p) v - p <p, v> with p = softmax(x), by differences and by hvp."""
    draw = torch.Generator().manual_seed(1)
    x, v = (torch.randn(64, dtype=torch.float64, generator=draw) for _ in range(2))
    p, h = torch.softmax(x, 0), METHODS[3].best(torch.finfo(torch.float64).eps)
    known = p * v - p * p.dot(v)
    up, down = (gradient(log_sum_exp, x + step * v) for step in (h, -h))
    ways = (("difference of gradients", (up - down) / (2 * h), 1e-8), ("hvp", hvp(log_sum_exp, x, v), 1e-13))
    return [
        Check(f"H v of log sum exp by {way}: relative error", ((z - known).norm() / known.norm()).item(), 0, tolerance)
        for way, z, tolerance in ways
    ]


def log_sum_exp(x: Tensor) -> Tensor:
    """Compute log sum exp, whose gradient is softmax(x)."""
    return torch.logsumexp(x, 0)


def too_small(x: Tensor, h: float = 1e-8) -> Tensor:
    """Fail in float32, where 1 + 1e-8 == 1."""
    return (torch.square(x + h) - torch.square(x - h)) / (2 * h)


def aliased(x: Tensor, h: float = 1e-3) -> Tensor:
    """Fail, as both names are one tensor, which is shifted up and down again."""
    up = down = x
    up += h
    down -= h
    return (torch.square(up) - torch.square(down)) / (2 * h)


def halved(x: Tensor, h: float = 1e-3) -> Tensor:
    """Fail, as the two points are 2 h apart."""
    return (torch.square(x + h) - torch.square(x - h)) / h


def _broken() -> list[Check]:
    """Check the results of the broken versions for the derivative 2, and of gradcheck on a correct gradient."""
    one = torch.tensor(1.0, dtype=torch.float64)
    wrong = {
        "x^2 at 1 in float32, step 1e-8": (too_small(one.float()), 0.0),
        "x^2 at 1, both sides one tensor": (aliased(one.clone()), 0.0),
        "x^2 at 1, divided by h": (halved(one), 4.0),
    }
    return [
        *(Check(f"{what}: gives, for 2", found.item(), n, 1e-9, "by hand") for what, (found, n) in wrong.items()),
        Check("gradcheck of exp, float64", _gradcheck(torch.float64), 1.0, 0.0, "observed"),
        Check("gradcheck of exp, float32", _gradcheck(torch.float32), "GradcheckError", 0.0, "observed"),
    ]


def _gradcheck(dtype: torch.dtype) -> float | str:
    x = torch.ones(8, dtype=dtype, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns about float32 before it fails
        return value_or_error(lambda: torch.tensor(float(torch.autograd.gradcheck(torch.exp, x))))


def _directional() -> list[Check]:
    """Check a correct gradient, and one 1% too long, whose relative error is 0.01 / 1.01."""
    x = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    grad = gradient(log_sum_exp, x)
    right = directional(log_sum_exp, x, grad)
    wrong = directional(log_sum_exp, x, grad, gradient_at_x=1.01 * grad)
    return [
        Check("gradcheck.directional of a right gradient: error", right.error, 0.0, 1e-8),
        Check("gradcheck.directional of one 1% too long: error", wrong.error, 0.01 / 1.01, 1e-4),
    ]


def _plot(curves: Curves) -> Figure:
    figure, panes = panels(2, width=10, height=4.6)
    titles = ("first derivative", "second derivative")
    for axes, title, methods in zip(panes, titles, (METHODS[:2], METHODS[2:]), strict=True):
        for method, colour in zip(methods, (VERMILION, BLUE), strict=True):
            for kind, style in (("float64", "-"), ("float32", "--")):
                curve = curves[method.name, kind]
                axes.loglog(STEPS, curve, style, color=colour, label=f"{method.name}, {kind}")
                i = int(np.argmin(curve))
                axes.plot(STEPS[i], curve[i], "o", color=colour)
        axes.set(xlabel="step $h$", ylabel="relative error", xlim=(1e-13, 1), ylim=(1e-12, 1e4))
        axes.set_title(f"{title} of exp")
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    panes[0].text(2e-13, 2, "float32: $x + h = x$")
    return figure
