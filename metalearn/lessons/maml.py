"""The MAML update: the second-order term of the meta-gradient, compared with dense Hessians.

    theta_0 = theta,    theta_{k+1} = theta_k - alpha g_k,    g_k = dL_support(theta_k)
    first order:     dL_query(theta_K)
    second order:    (I - alpha H_0) ... (I - alpha H_{K-1}) dL_query(theta_K),    H_k = d2 L_support(theta_k)

(Finn, Abbeel & Levine 2017, arXiv 1703.03400, sections 2.2 and 5.2.)
"""

from __future__ import annotations

import math

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import cosine_similarity, mse_loss

from metalearn.core.types import Episodes, Params
from metalearn.derivatives import gradient, hessian
from metalearn.derivatives.gradcheck import directional
from metalearn.inner import InnerLoop, adapt
from metalearn.lessons.lesson import BLUE, GREEN, GREY, VERMILION, Check, Lesson, panels, source_of
from metalearn.metagrad import meta_gradient

_CLAIM = """\
The meta-gradient differentiates the query loss after adaptation in the weights before it. The inner gradient depends \
on those weights too, so the chain rule multiplies by (I - alpha H), with H the Hessian of the support loss. \
First-order MAML leaves out this factor: the two meta-gradients of one step differ by exactly \
-alpha H dL_query(theta'), and those of K steps by a product of K such factors.

The gap grows with alpha and with K, to first order in alpha as K alpha H g. It affects not only the length: for a \
line fitted with a step so large that alpha H > 1, the factor is negative and first order has the wrong sign."""

HIDDEN = 4
ALPHA = 0.1


def forward(params: Params, x: Tensor) -> Tensor:
    """Compute a tanh network of one hidden layer; its 13 weights are one vector, so that H is a matrix."""
    w1, b1, w2, b2 = params["theta"].split([HIDDEN, HIDDEN, HIDDEN, 1])
    prediction: Tensor = torch.tanh(x[:, None] * w1 + b1) @ w2 + b2
    return prediction


def line(params: Params, x: Tensor) -> Tensor:
    """Compute a line through the origin, theta x; with a squared error its H is 2 x^2."""
    return params["theta"] * x


def meta(theta: Tensor, *, second_order: bool, alpha: float = ALPHA, steps: int = 1) -> Tensor:
    """Return the meta-gradient of the library."""
    inner = InnerLoop(lr=alpha, steps=steps, second_order=second_order, engine="unroll")
    return meta_gradient(forward, {"theta": theta}, SINE, inner, loss=mse_loss).grads["theta"]


def by_hessians(theta: Tensor, *, alpha: float = ALPHA, steps: int = 1) -> Tensor:
    """Compute (I - alpha H_0) ... (I - alpha H_{K-1}) dL_query(theta_K) from dense Hessians."""
    product = eye = torch.eye(len(theta), dtype=theta.dtype)
    for k in range(steps):
        theta_k = adapted(theta, alpha=alpha, steps=k)
        product = product @ (eye - alpha * hessian(support_loss, theta_k))
    return product @ gradient(query_loss, adapted(theta, alpha=alpha, steps=steps))


def adapted(theta: Tensor, *, alpha: float = ALPHA, steps: int = 1) -> Tensor:
    """Return theta_k, the weights after some steps on the support set."""
    inner = InnerLoop(lr=alpha, steps=steps)
    return adapt(forward, {"theta": theta}, SINE.support_x, SINE.support_y, inner, loss=mse_loss)["theta"][0]


def support_loss(theta: Tensor) -> Tensor:
    """Return the support loss of the one task."""
    return mse_loss(forward({"theta": theta}, SINE.support_x[0]), SINE.support_y[0])


def query_loss(theta: Tensor) -> Tensor:
    """Return the query loss of the one task."""
    return mse_loss(forward({"theta": theta}, SINE.query_x[0]), SINE.query_y[0])


_SUPPORT, _QUERY = (torch.linspace(-end, end, n, dtype=torch.float64)[None] for end, n in ((2.0, 5), (2.6, 7)))
SINE = Episodes(_SUPPORT, torch.sin(_SUPPORT + 0.5), _QUERY, torch.sin(_QUERY + 0.5))
"""One task: a sine, with five support points and seven query points between and outside of them."""
THETA = torch.randn(3 * HIDDEN + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def lesson() -> Lesson:
    """Run the lesson."""
    first, second = _both()
    cosines = {steps: cosine_similarity(*_both(steps=steps), dim=0).item() for steps in (1, 3, 5)}
    return Lesson(
        title="maml: the Hessian term of the meta-gradient",
        claim=_CLAIM,
        code=source_of(forward, support_loss, query_loss, adapted, meta, by_hessians),
        checks=[
            *(*_by_hand(), *_one_step(first, second), *_three_steps()),
            *(*_finite_differences(first, second), *_scaling()),
        ],
        notes=[
            f"relative gap, alpha = {ALPHA}, K = 1: {_relative(second, first):.3f}",
            f"cosine, alpha = {ALPHA}: {', '.join(f'{c:.4f} at K = {steps}' for steps, c in cosines.items())}",
        ],
        plots={"hessian_term": _plot(first, second)},
    )


def _by_hand() -> list[Check]:
    """Check the line with support (1, 3), query (2, 5) and theta = 1, where H = 2."""
    task = Episodes(*(torch.tensor([[v]], dtype=torch.float64) for v in (1.0, 3.0, 2.0, 5.0)))
    checks = []
    theta = {"theta": torch.tensor(1.0, dtype=torch.float64)}
    for alpha, steps, first, second in ((0.1, 1, -8.8, -7.04), (0.1, 3, -4.192, -2.146304), (0.6, 1, 7.2, -1.44)):
        for order, expected in (("first", first), ("second", second)):
            inner = InnerLoop(lr=alpha, steps=steps, second_order=order == "second", engine="unroll")
            value = meta_gradient(line, theta, task, inner, loss=mse_loss).grads["theta"].item()
            checks.append(Check(f"line, alpha = {alpha}, K = {steps}: {order} order", value, expected, tolerance=1e-12))
    return checks


def _one_step(first: Tensor, second: Tensor) -> list[Check]:
    support_hessian, query_gradient = hessian(support_loss, THETA), gradient(query_loss, adapted(THETA))
    term = -ALPHA * support_hessian @ query_gradient
    dense = "dense Hessian"
    return [
        Check("first order against dL_query(theta'), relative", _relative(first, query_gradient), 0.0, 1e-12),
        Check("length of the Hessian term, second - first", _length(second - first), _length(term), 1e-12, dense),
        Check("second - first against -alpha H g, relative", _relative(second - first, term), 0.0, 1e-10, dense),
        Check("H against its transpose, relative", _relative(support_hessian, support_hessian.T), 0.0, 1e-12),
    ]


def _three_steps() -> list[Check]:
    first, second = _both(steps=3)
    product = "(I - alpha H_0)(I - alpha H_1)(I - alpha H_2) g"
    dense, query_gradient = by_hessians(THETA, steps=3), gradient(query_loss, adapted(THETA, steps=3))
    return [
        Check("K = 3: first order against g, relative", _relative(first, query_gradient), 0.0, 1e-12),
        Check(f"second order against {product}, relative", _relative(second, dense), 0.0, 1e-10, "dense Hessian"),
    ]


def _finite_differences(first: Tensor, second: Tensor) -> list[Check]:
    right, wrong = (
        directional(lambda theta: query_loss(adapted(theta)), THETA, gradient_at_x=g).error for g in (second, first)
    )
    source = "finite differences"
    return [
        Check("error of second order along a direction, relative", right, 0.0, 1e-8, source),
        Check("first order is wrong there by more than 1%", str(wrong > 0.01), "True", source=source),
    ]


def _scaling() -> list[Check]:
    g, curvature = gradient(query_loss, THETA), hessian(support_loss, THETA)
    limit = 3 * _length(curvature @ g) / _length(g)
    pairs = (_both(alpha=alpha, steps=3) for alpha in (1e-5, 1e-4))
    gaps = [_relative(second, first) for first, second in pairs]
    return [
        Check("K = 3: gap / alpha at alpha = 1e-5, against 3 |H g| / |g|", gaps[0] / 1e-5, limit, 1e-3 * limit),
        Check("K = 3: power of alpha that the gap grows with", math.log10(gaps[1] / gaps[0]), 1.0, 1e-2),
    ]


def _both(*, alpha: float = ALPHA, steps: int = 1) -> tuple[Tensor, Tensor]:
    """Return the first-order and the second-order meta-gradient."""
    first, second = (meta(THETA, second_order=order, alpha=alpha, steps=steps) for order in (False, True))
    return first, second


def _relative(a: Tensor, b: Tensor) -> float:
    return _length(a - b) / _length(b)


def _length(v: Tensor) -> float:
    return float(torch.linalg.vector_norm(v))


def _plot(first: Tensor, second: Tensor) -> Figure:
    figure, axes = panels(3, width=13, height=4)
    term = -ALPHA * hessian(support_loss, THETA) @ first
    index = list(range(1, len(term) + 1))
    axes[0].bar(index, term, color=GREY, alpha=0.5, label=r"$-\alpha H g$, dense Hessian")
    axes[0].plot(index, second - first, "o", color=VERMILION, markersize=5, label="second - first, unroll")
    axes[0].axhline(0, color="black", linewidth=0.5)
    title = rf"Hessian term, K = 1, $\alpha$ = {ALPHA}"
    axes[0].set(title=title, xlabel="weight", ylabel="component of the meta-gradient")
    rates = torch.logspace(-3, -0.5, 21).tolist()
    for steps, colour, marker in ((1, BLUE, "o"), (3, VERMILION, "s"), (5, GREEN, "D")):
        pairs = [_both(alpha=alpha, steps=steps) for alpha in rates]
        style = {"color": colour, "marker": marker, "markersize": 4, "label": f"K = {steps}"}
        axes[1].loglog(rates, [_relative(second, first) for first, second in pairs], **style)
        axes[2].semilogx(rates, [cosine_similarity(*pair, dim=0) for pair in pairs], **style)
    step_size = r"inner step size $\alpha$"
    axes[1].set(title="relative gap, |second - first| / |first|", xlabel=step_size, ylabel="relative gap")
    axes[2].set(title="cosine between first and second order", xlabel=step_size, ylabel="cosine")
    for panel in axes[:2]:
        panel.legend(frameon=False)
    return figure
