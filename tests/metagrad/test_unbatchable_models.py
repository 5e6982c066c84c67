"""Models that vmap cannot batch, or differentiates wrongly, equal a plain loop over tasks."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, spectral_norm

from metalearn import Episodes, InnerLoop, Loss, Params, adapt, functionalize, meta_gradient, predict
from metalearn.core.params import relative_error
from metalearn.inner.batching import is_batchable
from metalearn.metagrad import ENGINES
from metalearn.metagrad.baselines.by_hand import meta_gradient as by_hand
from tests.metagrad.models import Lambda

DOUBLE = torch.float64
T, S, Q, N = 3, 6, 5, 3


def between(function: Callable[[Tensor], Tensor], out: int = N) -> nn.Sequential:
    """Return a network with a function before its last layer."""
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Lambda(function), nn.Linear(4, out)).double()


class WrittenBeforeSetupContext(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        slope: Tensor = 3 * x**2 * g
        return slope


def hooked(h: Tensor) -> Tensor:
    h = h * 1
    h.register_hook(lambda g: 0.5 * g)
    return h


def masked(prediction: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(prediction[labels > 0], labels[labels > 0], reduction="sum")


TARGETS = torch.randn(T, S, dtype=DOUBLE), torch.randn(T, Q, dtype=DOUBLE)
LABELS = torch.randint(N, (T, S)), torch.randint(N, (T, Q))
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "branch": lambda h: h if h.sum() > 0 else -h,
    "item": lambda h: h * round(h.sum().item()),
    "old function": WrittenBeforeSetupContext.apply,
    "hook": hooked,
    "hook if a gradient is required": lambda h: hooked(h) if h.requires_grad else h,
    "hook if in a graph": lambda h: hooked(h) if h.grad_fn is not None else h,
    "hook if no leaf": lambda h: h if h.is_leaf else hooked(h),
    "as_strided": lambda h: h.as_strided((len(h), 4), (4, 1)) ** 2,
    "select_scatter": lambda h: h.select_scatter(h[:, 1] ** 2, 1, 0),
}
weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5], dtype=DOUBLE), label_smoothing=0.1)
Case = tuple[Callable[[], nn.Module], Loss, tuple[Tensor, Tensor]]
CASES: dict[str, Case] = {
    **{name: (partial(between, f), functional.cross_entropy, LABELS) for name, f in FUNCTIONS.items()},
    "boolean mask": (partial(between, torch.tanh), masked, LABELS),
    "weights and smoothing": (partial(between, torch.tanh), weighted, LABELS),
    "gaussian likelihood": (
        partial(between, torch.tanh, out=2),
        lambda p, y: functional.gaussian_nll_loss(p[:, 0], y, functional.softplus(p[:, 1])),
        TARGETS,
    ),
    "numpy targets": (
        partial(between, torch.tanh, out=1),
        lambda p, y: functional.mse_loss(p[:, 0], torch.from_numpy(y.numpy())),
        TARGETS,
    ),
}


def episodes(targets: tuple[Tensor, Tensor] = LABELS) -> Episodes:
    generator = torch.Generator().manual_seed(5)
    draw = [torch.randn(T, n, 4, dtype=DOUBLE, generator=generator) for n in (S, Q)]
    return Episodes(draw[0], targets[0], draw[1], targets[1])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", CASES)
def test_unbatchable_model_equals_plain_loop(case: str, engine: str) -> None:
    make, loss, targets = CASES[case]
    module = make()
    tasks, inner = episodes(targets), InnerLoop(lr=0.1, steps=2, engine=engine)
    want = by_hand(module, tasks, inner, loss=loss)
    for _ in range(2):  # the second time the model is known to be unbatchable
        got = meta_gradient(*functionalize(module), tasks, inner, loss=loss)
        assert relative_error(got.grads, want.grads) < 1e-9
        torch.testing.assert_close(got.predictions, want.predictions)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("normalise", [spectral_norm, parametrizations.spectral_norm])
def test_spectral_norm_starts_every_pass_with_the_same_vectors(
    normalise: Any, engine: str, caplog: pytest.LogCaptureFixture
) -> None:
    module = between(torch.tanh)
    normalise(module[0])
    tasks, inner = episodes(), InnerLoop(lr=0.1, steps=1, engine=engine)
    buffers = {name: b.clone() for name, b in module.named_buffers()}

    def logits(params: Params, x: Tensor) -> Tensor:
        fresh = {name: b.clone() for name, b in buffers.items()}
        return torch.func.functional_call(module, (params, fresh), (x,))

    theta = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
    total = torch.zeros((), dtype=DOUBLE)
    for t in range(T):
        support = functional.cross_entropy(logits(theta, tasks.support_x[t]), tasks.support_y[t])
        grads = torch.autograd.grad(support, list(theta.values()), create_graph=True)
        fast = {name: p - inner.lr * g for (name, p), g in zip(theta.items(), grads, strict=True)}
        total = total + functional.cross_entropy(logits(fast, tasks.query_x[t]), tasks.query_y[t]) / T
    want = dict(zip(theta, torch.autograd.grad(total, list(theta.values())), strict=True))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert relative_error(meta_gradient(*functionalize(module), tasks, inner).grads, want) < 1e-9
    assert all(torch.equal(b, buffers[name]) for name, b in module.named_buffers())
    assert caplog.text.count("writes to its buffer '0.") == 1


def test_unbatchable_model_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    class Own(nn.Sequential):
        """A class of this test alone, as each class and reason cause one warning."""

    forward, theta = functionalize(Own(*between(FUNCTIONS["branch"])))
    tasks, inner = episodes(), InnerLoop(lr=0.1, steps=1)
    with caplog.at_level(logging.WARNING):
        fast = adapt(forward, theta, tasks.support_x, tasks.support_y, inner)
        predict(forward, fast, tasks.query_x)
    warnings = [r.getMessage() for r in caplog.records if "one after another" in r.getMessage()]
    assert len(warnings) == 1
    assert "data-dependent control flow" in warnings[0]


def raises(h: Tensor) -> Tensor:
    raise RuntimeError("mine")


@pytest.mark.parametrize(
    ("function", "message"),
    [(raises, r"^mine\nRaised in"), (lambda h: h @ torch.ones(3, 3, dtype=DOUBLE), r"shapes cannot be multiplied")],
)
def test_error_of_the_model_does_not_make_it_unbatchable(
    function: Callable[[Tensor], Tensor], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    forward, theta = functionalize(between(function))
    with caplog.at_level(logging.WARNING), pytest.raises(RuntimeError, match=message):
        meta_gradient(forward, theta, episodes(), InnerLoop(lr=0.1, steps=1))
    assert is_batchable(forward)
    assert not caplog.records


@pytest.mark.parametrize("layer", ["stochastic depth", "rsample", "rrelu"])
def test_random_layer_without_batching_rule_draws_for_every_task(layer: str) -> None:
    from torchvision.ops import StochasticDepth

    layers: dict[str, Callable[[Tensor], Tensor]] = {
        "stochastic depth": StochasticDepth(0.5, "row"),
        "rsample": lambda h: torch.distributions.Normal(h, 1.0).rsample(),
        "rrelu": lambda h: functional.rrelu(h - 1, training=True),
    }
    forward, theta = functionalize(between(layers[layer]))
    x = torch.ones(1, 1, 4, dtype=DOUBLE).expand(40, 1, 4)
    fast = {name: p.expand(40, *p.shape) for name, p in theta.items()}
    assert len(predict(forward, fast, x).unique(dim=0)) > 1
    result = meta_gradient(forward, theta, episodes(), InnerLoop(lr=0.1, steps=2, engine="checkpoint"))
    assert all(torch.isfinite(g).all() for g in result.grads.values())


@pytest.mark.parametrize("engine", ["checkpoint", "adjoint"])
@pytest.mark.parametrize("function", ["branch", "item", "old function"])
def test_failed_vmap_does_not_change_random_draws(function: str, engine: str) -> None:
    def first(engine: str) -> Params:
        torch.manual_seed(1)
        module = nn.Sequential(nn.Dropout(0.5), between(FUNCTIONS[function]))  # new, so that vmap is tried
        return meta_gradient(*functionalize(module), episodes(), InnerLoop(lr=0.5, steps=2, engine=engine)).grads

    assert relative_error(first(engine), first("unroll")) < 1e-9


def test_module_keeps_no_batched_tensor() -> None:
    class Keeps(nn.Linear):
        last: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            self.last = super().forward(x)
            return self.last

    module = Keeps(4, N).double()
    module.last = before = torch.ones(1)
    meta_gradient(*functionalize(module), episodes(), InnerLoop(lr=0.1, steps=1))
    assert module.last is before
    copy.deepcopy(module)


def test_unbatchable_loss_leaves_the_model_batchable_with_others() -> None:
    forward, theta = functionalize(between(torch.tanh))
    tasks, inner = episodes(), InnerLoop(lr=0.1, steps=1)

    meta_gradient(forward, theta, tasks, inner, loss=masked)
    assert not is_batchable(forward, masked)
    assert is_batchable(forward, functional.cross_entropy)
    assert is_batchable(forward)


@pytest.mark.parametrize("engine", ENGINES)
def test_data_attribute_is_a_constant(engine: str) -> None:
    module = between(lambda h: (h if h.sum() > 0 else -h) * h.detach())
    hidden = between(lambda h: (h if h.sum() > 0 else -h) * h.data)
    hidden.load_state_dict(module.state_dict())
    tasks, inner = episodes(), InnerLoop(lr=0.5, steps=2, engine=engine)
    want = by_hand(module, tasks, inner)
    assert relative_error(meta_gradient(*functionalize(hidden), tasks, inner).grads, want.grads) < 1e-9


def test_empty_parameter_gets_empty_gradient() -> None:
    module = between(torch.tanh)
    module.register_parameter("none", nn.Parameter(torch.empty(0, dtype=DOUBLE)))
    for engine in ENGINES:
        grads = meta_gradient(*functionalize(module), episodes(), InnerLoop(lr=0.1, steps=1, engine=engine)).grads
        assert grads["none"].shape == (0,)
