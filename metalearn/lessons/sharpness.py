"""Sharpness: the largest eigenvalue of the loss's Hessian, against the step size of gradient descent.

    theta <- theta - lr grad L(theta)    on a quadratic: the error along eigenvalue l shrinks by (1 - lr l) a step,
    so it converges from everywhere if and only if lr < 2 / l_max

On a network the Hessian changes in training: it sharpens until it reaches 2 / lr, and stays there (Cohen et al. 2021,
"Gradient descent on neural networks typically occurs at the edge of stability", arXiv 2103.00065).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise

import torch
from matplotlib.figure import Figure
from torch import Tensor

from metalearn.core.profiling.hardware import one_thread
from metalearn.core.types import Params
from metalearn.data.glyphs import make_glyphs
from metalearn.derivatives import ScalarFunction, gradient, hessian, top_eigenvalues
from metalearn.lessons.lesson import BLUE, GREEN, VERMILION, Check, Lesson, panels, source_of, yes_or_no

_STEPS, _EVERY = 1200, 20
_AT_THE_EDGE = (0.25, 0.4)  # 2 / lr = 8 and 5, which the sharpness reaches
_BELOW = 0.05  # 2 / lr = 40, which it does not
_COLOURS = {0.05: GREEN, 0.25: BLUE, 0.4: VERMILION}

_CLAIM = """\
Gradient descent on a quadratic converges from everywhere if and only if lr < 2 / lambda_max. It is often concluded \
that a network's step must stay below 2 over its sharpness, or the loss diverges. But a network's sharpness is not \
constant. Under full-batch gradient descent it rises until it reaches 2 / lr, and then stays near it: beyond that the \
iterates oscillate along the sharpest direction, which drives them to where that direction is less sharp. The loss \
rises in some steps and falls over many. With a step so small that 2 / lr is far above the sharpness, the sharpness \
keeps rising slowly and the loss falls in every step.

The sharpness comes from derivatives.top_eigenvalues, Lanczos on Hessian-vector products, and is compared with the \
eigenvalues of the dense Hessian at the start and at the end."""


@dataclass(frozen=True)
class Run:
    """One training: the loss after every step, the sharpness after some, and the first and last parameters."""

    lr: float
    losses: list[float]
    sharpness: dict[int, float]
    start: Params
    end: Params


def network(theta: Params, x: Tensor) -> Tensor:
    """Compute three layers with tanh between, without biases; ``[examples, pixels]`` to ``[examples, classes]``."""
    return torch.tanh(torch.tanh(x @ theta["a"]) @ theta["b"]) @ theta["c"]


def train(loss: ScalarFunction, theta: Params, lr: float) -> Run:
    """Run full-batch gradient descent; compute the sharpness every 20 steps."""
    start, losses, sharpness = theta, [], {}
    for step in range(_STEPS + 1):
        losses.append(loss(theta).item())
        if step % _EVERY == 0:
            sharpness[step] = top_eigenvalues(loss, theta).item()
        grads = gradient(loss, theta)
        theta = {name: p - lr * grads[name] for name, p in theta.items()}
    return Run(lr, losses, sharpness, start, theta)


@one_thread()
def lesson() -> Lesson:
    """Run the lesson."""
    began = time.perf_counter()
    loss, theta = problem()
    runs = [train(loss, theta, lr) for lr in (_BELOW, *_AT_THE_EDGE)]
    return Lesson(
        title="Sharpness and the edge of stability",
        claim=_CLAIM,
        code=source_of(network, train),
        checks=[*_quadratic(), *_against_dense(loss, runs[-1]), *_below(runs[0]), *_edge(runs[1]), *_edge(runs[2])],
        notes=[*map(_note, runs), f"{time.perf_counter() - began:.1f} s for three runs of {_STEPS:,} steps"],
        plots={"sharpness": _plot(runs)},
    )


def problem() -> tuple[ScalarFunction, Params]:
    """Return the squared error on 80 drawings of 4 characters at 8 x 8 pixels, and 1,344 parameters in float64."""
    classes, drawings, size, hidden = 4, 20, 8, 16
    images = make_glyphs(classes=classes, drawings=drawings, size=size).double().flatten(0, 1).flatten(1)
    x = images - images.mean(dim=0)
    x = x / x.std()
    y = torch.eye(classes, dtype=torch.float64).repeat_interleave(drawings, dim=0)
    draw = torch.Generator().manual_seed(0)
    shapes = {"a": (size * size, hidden), "b": (hidden, hidden), "c": (hidden, classes)}
    # Half the usual scale, so that the sharpness starts well below 2 / lr.
    theta = {
        name: torch.randn(shape, generator=draw, dtype=torch.float64) / (2 * shape[0] ** 0.5)
        for name, shape in shapes.items()
    }
    return lambda theta: (network(theta, x) - y).square().sum(dim=1).mean() / 2, theta


def dense_sharpness(loss: ScalarFunction, theta: Params) -> float:
    """Return the largest of all eigenvalues of the Hessian."""
    blocks = hessian(loss, theta)
    rows = [torch.cat([blocks[a][b].flatten(p.ndim).flatten(0, -2) for b in theta], dim=1) for a, p in theta.items()]
    return float(torch.linalg.eigvalsh(torch.cat(rows))[-1])


def _against_dense(loss: ScalarFunction, run: Run) -> list[Check]:
    errors = {
        when: abs(top_eigenvalues(loss, theta).item() / dense_sharpness(loss, theta) - 1)
        for when, theta in (("start", run.start), ("end", run.end))
    }
    return [
        Check(f"sharpness at the {when}: Lanczos against dense, relative", error, 0.0, 1e-3, "eigvalsh")
        for when, error in errors.items()
    ]


def _quadratic() -> list[Check]:
    """Check x'Ax/2 with eigenvalues 10, 9.8, ..., 0.2: 50 steps multiply the error on the first by (1 - 10 lr)^50."""
    draw = torch.Generator().manual_seed(0)
    values = torch.linspace(10, 0.2, 50, dtype=torch.float64)
    q, _ = torch.linalg.qr(torch.randn(50, 50, dtype=torch.float64, generator=draw))
    a = q @ values.diag() @ q.T

    def f(x: Tensor) -> Tensor:
        return x.dot(a @ x) / 2

    def grown(x: Tensor, lr: float) -> float:
        first = x.norm()
        for _ in range(50):
            x = x - lr * gradient(f, x)
        return float(x.norm() / first)

    anywhere = torch.randn(50, dtype=torch.float64, generator=draw)
    falls_or_grows = ["falls" if grown(anywhere, lr) < 1 else "grows" for lr in (0.19, 0.21)]
    return [
        Check("quadratic: lambda_max", top_eigenvalues(f, anywhere).item(), 10.0, 1e-2),
        Check("quadratic, lr = 0.95 x 2 / lambda_max: growth in 50 steps", grown(q[:, 0], 0.19), 0.9**50, 1e-9),
        Check("quadratic, lr = 1.05 x 2 / lambda_max: growth in 50 steps", grown(q[:, 0], 0.21), 1.1**50, 1e-6),
        Check("the first, from anywhere", falls_or_grows[0], "falls"),
        Check("the second, from anywhere", falls_or_grows[1], "grows"),
    ]


def _late(run: Run) -> float:
    """Average the sharpness over the last quarter."""
    late = [s for step, s in run.sharpness.items() if step >= 0.75 * _STEPS]
    return sum(late) / len(late)


def _rises(run: Run) -> int:
    """Count the steps in which the loss rose."""
    return sum(after > before for before, after in pairwise(run.losses))


def _edge(run: Run) -> list[Check]:
    """Check a run at the edge: sharpness near 2 / lr in the end, above it at some time, and still a lower loss."""
    line, name, source = 2 / run.lr, f"lr = {run.lr}", "Cohen et al. 2021, empirical"
    above = [step for step, s in run.sharpness.items() if s > line]
    fell = bool(above) and run.losses[-1] < run.losses[above[0]] / 2
    return [
        Check(f"{name}: sharpness over 2 / lr, mean of the last quarter", _late(run) / line, 1.0, 0.15, source),
        Check(f"{name}: sharpness above 2 / lr at some step", yes_or_no(bool(above)), "yes", 0.0, source),
        Check(f"{name}: loss halved at least since that step", yes_or_no(fell), "yes", 0.0, source),
    ]


def _below(run: Run) -> list[Check]:
    """Check a run below the edge: the sharpness stays below 2 / lr, and the loss falls in every step."""
    reached = yes_or_no(max(run.sharpness.values()) > 2 / run.lr)
    return [
        Check(f"lr = {run.lr}: sharpness above 2 / lr at some step", reached, "no", source="measured"),
        Check(f"lr = {run.lr}: loss rises in some step", yes_or_no(_rises(run) > 0), "no", source="measured"),
    ]


def _note(run: Run) -> str:
    return (
        f"lr = {run.lr}, 2 / lr = {2 / run.lr:g}: sharpness {run.sharpness[0]:.1f} at first, at most "
        f"{max(run.sharpness.values()):.1f}, {_late(run):.1f} in the last quarter; loss {run.losses[0]:.3f} to "
        f"{run.losses[-1]:.1e}, rising in {_rises(run)} of {_STEPS:,} steps"
    )


def _plot(runs: list[Run]) -> Figure:
    figure, (loss, sharp) = panels(2, width=10, height=4)
    for run in runs:
        colour = _COLOURS[run.lr]
        loss.semilogy(run.losses, color=colour, linewidth=1, label=f"lr = {run.lr}")
        sharp.plot(list(run.sharpness), list(run.sharpness.values()), color=colour, label=f"lr = {run.lr}")
        if run.lr in _AT_THE_EDGE:
            sharp.axhline(2 / run.lr, color=colour, linestyle="--", linewidth=1)
            sharp.text(_STEPS, 2 / run.lr + 0.15, f"2 / {run.lr}", color=colour, ha="right", va="bottom")
    loss.set(xlabel="step", ylabel="squared error", title="loss")
    sharp.set(xlabel="step", ylabel="largest eigenvalue of the Hessian", title="sharpness")
    loss.legend(frameon=False)
    return figure
