"""Models that vmap cannot batch, or differentiates wrongly, equal a plain loop over tasks."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, spectral_norm

from metalearn import Episodes, InnerLoop, Loss, Params, adapt, functionalize, meta_gradient, predict
from metalearn.core.functional import relative_error
from metalearn.inner.batching import is_batchable
from metalearn.metagrad import ENGINES
from metalearn.metagrad.baselines.by_hand import meta_gradient as by_hand

DOUBLE = torch.float64
T, S, Q, N = 3, 6, 5, 3


class Between(nn.Module):
    """A function between two linear layers."""

    def __init__(self, function: Callable[[Tensor], Tensor], out: int = N) -> None:
        super().__init__()
        self.body, self.function, self.head = nn.Linear(4, 4), function, nn.Linear(4, out)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.function(torch.tanh(self.body(x))))
        return logits


class Recurrent(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.recurrent, self.head = kind(2, 4, batch_first=True), nn.Linear(4, N)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.recurrent(x.unflatten(-1, (2, 2)))[0][:, -1])
        return logits


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


def hooked_if_in_a_graph(h: Tensor) -> Tensor:
    return hooked(h) if h.grad_fn is not None else h


def hooked_if_no_leaf(h: Tensor) -> Tensor:
    return h if h.is_leaf else hooked(h)


def hooked_if_asked(h: Tensor) -> Tensor:
    return hooked(h) if h.requires_grad else h


TARGETS = torch.randn(T, S, dtype=DOUBLE), torch.randn(T, Q, dtype=DOUBLE)
LABELS = torch.randint(N, (T, S)), torch.randint(N, (T, Q))
CASES: dict[str, tuple[Callable[[], nn.Module], Loss, tuple[Tensor, Tensor]]] = {
    "branch": (lambda: Between(lambda h: h if h.sum() > 0 else -h), functional.cross_entropy, LABELS),
    "item": (lambda: Between(lambda h: h * round(h.sum().item())), functional.cross_entropy, LABELS),
    "lstm": (lambda: Recurrent(nn.LSTM), functional.cross_entropy, LABELS),
    "gru": (lambda: Recurrent(nn.GRU), functional.cross_entropy, LABELS),
    "rnn": (lambda: Recurrent(nn.RNN), functional.cross_entropy, LABELS),
    "old function": (lambda: Between(WrittenBeforeSetupContext.apply), functional.cross_entropy, LABELS),
    "hook": (lambda: Between(hooked), functional.cross_entropy, LABELS),
    "hook if a gradient is required": (lambda: Between(hooked_if_asked), functional.cross_entropy, LABELS),
    "hook if in a graph": (lambda: Between(hooked_if_in_a_graph), functional.cross_entropy, LABELS),
    "hook if no leaf": (lambda: Between(hooked_if_no_leaf), functional.cross_entropy, LABELS),
    "as_strided": (lambda: Between(lambda h: h.as_strided((len(h), 4), (4, 1)) ** 2), functional.cross_entropy, LABELS),
    "select_scatter": (
        lambda: Between(lambda h: h.select_scatter(h[:, 1] ** 2, 1, 0)),
        functional.cross_entropy,
        LABELS,
    ),
    "boolean mask": (
        lambda: Between(torch.tanh),
        lambda p, y: functional.cross_entropy(p[y > 0], y[y > 0], reduction="sum"),
        LABELS,
    ),
    "weights and smoothing": (
        lambda: Between(torch.tanh),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5], dtype=DOUBLE), label_smoothing=0.1),
        LABELS,
    ),
    "gaussian likelihood": (
        lambda: Between(torch.tanh, out=2),
        lambda p, y: functional.gaussian_nll_loss(p[:, 0], y, functional.softplus(p[:, 1])),
        TARGETS,
    ),
    "numpy targets": (
        lambda: Between(torch.tanh, out=1),
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
    module = make().double()
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
    module = Between(torch.tanh).double()
    normalise(module.body)
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
    assert caplog.text.count("writes to its buffer 'body.") == 1


def test_unbatchable_model_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    class Own(Recurrent):
        """Of this test alone, as a class and a reason are warned of once."""

    forward, theta = functionalize(Own(nn.LSTM).double())
    tasks, inner = episodes(), InnerLoop(lr=0.1, steps=1)
    with caplog.at_level(logging.WARNING):
        fast = adapt(forward, theta, tasks.support_x, tasks.support_y, inner)
        predict(forward, fast, tasks.query_x)
    warnings = [r.getMessage() for r in caplog.records if "one after another" in r.getMessage()]
    assert len(warnings) == 1
    assert "aten::lstm" in warnings[0]


def test_error_of_the_model_is_not_logged_as_unbatchable(caplog: pytest.LogCaptureFixture) -> None:
    forward, theta = functionalize(Between(lambda h: h @ torch.ones(3, 3, dtype=DOUBLE)).double())
    with caplog.at_level(logging.WARNING), pytest.raises(RuntimeError, match=r"shapes cannot be multiplied"):
        meta_gradient(forward, theta, episodes(), InnerLoop(lr=0.1, steps=1))
    assert not caplog.records


@pytest.mark.parametrize("layer", ["stochastic depth", "rsample", "rrelu"])
def test_random_layer_without_batching_rule_draws_for_every_task(layer: str) -> None:
    from torchvision.ops import StochasticDepth

    layers: dict[str, Callable[[Tensor], Tensor]] = {
        "stochastic depth": StochasticDepth(0.5, "row"),
        "rsample": lambda h: torch.distributions.Normal(h, 1.0).rsample(),
        "rrelu": lambda h: functional.rrelu(h - 1, training=True),
    }
    forward, theta = functionalize(Between(layers[layer]).double())
    x = torch.ones(1, 1, 4, dtype=DOUBLE).expand(40, 1, 4)
    fast = {name: p.expand(40, *p.shape) for name, p in theta.items()}
    assert len(predict(forward, fast, x).unique(dim=0)) > 1
    result = meta_gradient(forward, theta, episodes(), InnerLoop(lr=0.1, steps=2, engine="checkpoint"))
    assert all(torch.isfinite(g).all() for g in result.grads.values())


@pytest.mark.parametrize("engine", ["checkpoint", "adjoint"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_failed_vmap_does_not_change_random_draws(kind: Any, engine: str) -> None:
    def first(engine: str) -> Params:
        torch.manual_seed(1)
        module = nn.Sequential(nn.Dropout(0.5), Recurrent(kind)).double()  # new, so that vmap is tried
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


def test_error_of_the_model_does_not_make_it_unbatchable(caplog: pytest.LogCaptureFixture) -> None:
    class Raises(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("mine")

    forward, theta = functionalize(Raises(4, N).double())
    with pytest.raises(RuntimeError, match=r"^mine\nRaised in"):
        meta_gradient(forward, theta, episodes(), InnerLoop(lr=0.1, steps=1))
    assert is_batchable(forward)
    assert not caplog.records


def test_unbatchable_loss_leaves_the_model_batchable_with_others() -> None:
    forward, theta = functionalize(Between(torch.tanh).double())
    tasks, inner = episodes(), InnerLoop(lr=0.1, steps=1)

    def masked(p: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(p[y > 0], y[y > 0], reduction="sum")

    meta_gradient(forward, theta, tasks, inner, loss=masked)
    assert not is_batchable(forward, masked)
    assert is_batchable(forward, functional.cross_entropy)
    assert is_batchable(forward)


@pytest.mark.parametrize("engine", ENGINES)
def test_data_attribute_is_a_constant(engine: str) -> None:
    module = Between(lambda h: (h if h.sum() > 0 else -h) * h.detach()).double()
    hidden = Between(lambda h: (h if h.sum() > 0 else -h) * h.data).double()
    hidden.load_state_dict(module.state_dict())
    tasks, inner = episodes(), InnerLoop(lr=0.5, steps=2, engine=engine)
    want = by_hand(module, tasks, inner)
    assert relative_error(meta_gradient(*functionalize(hidden), tasks, inner).grads, want.grads) < 1e-9


def test_empty_parameter_gets_empty_gradient() -> None:
    module = Between(torch.tanh).double()
    module.register_parameter("none", nn.Parameter(torch.empty(0, dtype=DOUBLE)))
    for engine in ENGINES:
        grads = meta_gradient(*functionalize(module), episodes(), InnerLoop(lr=0.1, steps=1, engine=engine)).grads
        assert grads["none"].shape == (0,)
