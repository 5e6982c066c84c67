"""Pytrees of examples, two losses, meta-learned tensors: every engine against autograd, one task at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_map

from metalearn import SGD, Episodes, InnerLoop, Params, adapt, batches, functionalize, gradcheck, meta_gradient, predict
from metalearn.core.params import relative_error
from metalearn.core.profiling.memory import PeakTensorMemory
from metalearn.training.evaluation import predict_nontransductive

TASKS, EXAMPLES, LR, STEPS = 4, 5, 0.3, 3
ENGINES = [("unroll", None), ("unroll", 3), ("checkpoint", None), ("adjoint", None), ("adjoint", 1)]


class Text(nn.Module):
    """Takes words, a mask and features; returns logits and what they are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.hidden, self.head = nn.Embedding(9, 6), nn.Linear(9, 5), nn.Linear(5, 3)

    def forward(self, words: Tensor, mask: Tensor, features: Tensor, scale: Tensor | float = 1.0) -> dict[str, Tensor]:
        mean = (self.words(words) * mask[..., None]).sum(-2) / mask.sum(-1, keepdim=True)
        h = torch.tanh(self.hidden(torch.cat([mean, features], dim=-1)) * scale)
        return {"logits": self.head(h), "h": h}


@dataclass
class Sentence:
    words: Tensor
    mask: Tensor
    features: Tensor


class OfSentences(Text):
    def forward(self, sentence: Sentence) -> Any:  # type: ignore[override]
        return super().forward(sentence.words, sentence.mask, sentence.features)


def sentences(seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    words = torch.randint(9, (TASKS, EXAMPLES, 7), generator=g)
    mask = torch.rand(TASKS, EXAMPLES, 7, generator=g, dtype=torch.float64) + 0.1
    return {"words": words, "mask": mask, "features": torch.randn(TASKS, EXAMPLES, 3, generator=g, dtype=torch.float64)}


def labels(seed: int) -> Tensor:
    return torch.randint(3, (TASKS, EXAMPLES), generator=torch.Generator().manual_seed(seed))


KINDS: dict[str, tuple[type[nn.Module], Callable[[dict[str, Tensor]], Any]]] = {
    "dictionary": (Text, lambda x: x),
    "tuple": (Text, lambda x: tuple(x.values())),
    "dataclass": (OfSentences, lambda x: Sentence(**x)),
}


def model_and_tasks(kind: str = "dictionary") -> tuple[Any, Params, Episodes]:
    torch.manual_seed(0)
    module, pack = KINDS[kind]
    forward, theta = functionalize(module().double())
    return forward, theta, Episodes(pack(sentences(1)), labels(2), pack(sentences(3)), labels(4))


def loss_of_both(prediction: Mapping[str, Tensor], y: Tensor) -> Tensor:
    return cross_entropy(prediction["logits"], y) + 0.1 * prediction["h"].square().mean()


def weighted(prediction: Mapping[str, Tensor], y: Tensor, weights: Tensor, decay: Tensor) -> Tensor:
    losses = cross_entropy(prediction["logits"], y, reduction="none")
    return (weights * losses).mean() + decay * prediction["h"].square().mean()


def classify(prediction: Mapping[str, Tensor], y: Tensor) -> Tensor:
    return cross_entropy(prediction["logits"], y)


META = {"weights": torch.linspace(0.5, 1.5, EXAMPLES, dtype=torch.float64), "decay": torch.tensor(0.2).double()}


def by_autograd(
    forward: Any,
    theta: Params,
    episodes: Episodes,
    *,
    second_order: bool,
    loss: Any = loss_of_both,
    query_loss: Any = loss_of_both,
    to_loss: Params | None = None,
    to_model: Params | None = None,
) -> Params:
    """Return the gradients in theta and in the meta-learned tensors, by a loop over tasks."""
    theta, to_loss, to_model = (
        {name: p.clone().requires_grad_() for name, p in (tree or {}).items()} for tree in (theta, to_loss, to_model)
    )
    total = torch.zeros((), dtype=torch.float64)
    for t in range(TASKS):
        of_task = [tree_map(lambda leaf, t=t: leaf[t], getattr(episodes, f.name)) for f in dataclasses.fields(episodes)]
        support_x, support_y, query_x, query_y = of_task
        fast = dict(theta)
        for _ in range(STEPS):
            value = loss(forward(fast, support_x, **to_model), support_y, **to_loss)
            grads = torch.autograd.grad(value, list(fast.values()), create_graph=True)
            grads = grads if second_order else tuple(g.detach() for g in grads)
            fast = {name: w - LR * g for (name, w), g in zip(fast.items(), grads, strict=True)}
        total = total + query_loss(forward(fast, query_x, **to_model), query_y) / TASKS
    leaves = {**theta, **to_loss, **to_model}
    return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize(("engine", "chunk"), ENGINES)
def test_pytrees_give_the_gradient_of_one_task_at_a_time(
    kind: str, second_order: bool, engine: str, chunk: int | None
) -> None:
    forward, theta, episodes = model_and_tasks(kind)
    inner = InnerLoop(LR, STEPS, second_order=second_order, engine=engine, task_chunk=chunk)
    result = meta_gradient(forward, theta, episodes, inner, loss=loss_of_both)
    assert relative_error(result.grads, by_autograd(forward, theta, episodes, second_order=second_order)) < 1e-12
    assert {name: tuple(p.shape) for name, p in result.predictions.items()} == {"logits": (4, 5, 3), "h": (4, 5, 5)}
    assert not result.predictions["h"].requires_grad


def test_adapt_and_predict_take_pytrees() -> None:
    forward, theta, episodes = model_and_tasks()
    inner = InnerLoop(LR, STEPS)
    fast = adapt(forward, theta, episodes.support_x, episodes.support_y, inner, loss=loss_of_both)
    result = meta_gradient(forward, theta, episodes, inner, loss=loss_of_both)
    torch.testing.assert_close(predict(forward, fast, episodes.query_x), result.predictions)
    one_by_one = predict_nontransductive(forward, fast, episodes)  # the model has no batch statistics
    torch.testing.assert_close(one_by_one, result.predictions)


def test_batches_collate_pytrees() -> None:
    forward, theta, episodes = model_and_tasks()
    tasks = [
        tuple(
            tree_map(lambda leaf, t=t: leaf[t].numpy(), getattr(episodes, f.name)) for f in dataclasses.fields(episodes)
        )
        for t in range(TASKS)
    ]
    (collated,) = batches(tasks, TASKS)
    inner = InnerLoop(LR, STEPS)
    expected, got = (meta_gradient(forward, theta, e, inner, loss=loss_of_both).grads for e in (episodes, collated))
    assert relative_error(got, expected) == 0
    tasks[2][0].pop("mask")
    with pytest.raises(ValueError, match=r"item 2 has .*words.*features.*, and item 0.*support_x\['mask'\]"):
        list(batches(tasks, TASKS))


@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize(("engine", "chunk"), ENGINES)
def test_two_losses_and_meta_learned_tensors(second_order: bool, engine: str, chunk: int | None) -> None:
    forward, theta, episodes = model_and_tasks()
    to_model = {"scale": torch.linspace(0.9, 1.1, 5).double()}
    inner = InnerLoop(LR, STEPS, second_order=second_order, engine=engine, task_chunk=chunk)
    # In first order the support loss takes constants, as what it alone takes has no gradient.
    loss, to_loss = (weighted, META) if second_order else (fixed, {})
    result = meta_gradient(
        forward, theta, episodes, inner, loss=loss, query_loss=classify, meta={**to_loss, **to_model}
    )
    two: dict[str, Any] = {"loss": loss, "query_loss": classify, "to_loss": to_loss, "to_model": to_model}
    expected = by_autograd(forward, theta, episodes, second_order=second_order, **two)
    assert result.meta_grads.keys() == {*to_loss, "scale"}
    assert result.grads.keys() == theta.keys()
    found = {**result.grads, **result.meta_grads}
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-10, atol=1e-13, msg=name)


def fixed(prediction: Mapping[str, Tensor], y: Tensor) -> Tensor:
    return weighted(prediction, y, **META)


def test_meta_learned_tensors_against_differences() -> None:
    forward, theta, episodes = model_and_tasks()
    inner = InnerLoop(LR, STEPS, engine="adjoint")

    def query_loss(meta: Params) -> Tensor:
        return meta_gradient(forward, theta, episodes, inner, loss=weighted, query_loss=classify, meta=meta).loss

    grads = meta_gradient(forward, theta, episodes, inner, loss=weighted, query_loss=classify, meta=META).meta_grads
    assert gradcheck.directional(query_loss, META, gradient_at_x=grads).error < 1e-8


@dataclass(frozen=True)
class Learned(SGD):
    """An optimiser with meta-learned parameters: d = g * gain + tanh(g) * bend."""

    def update(self, k: int, grads: Params, state: Params, gain: Tensor, bend: Tensor) -> tuple[Params, Params]:  # type: ignore[override]
        def scaled(w: Tensor, g: Tensor) -> Tensor:
            return w.view(-1, *[1] * (g.ndim - 1)) * g

        return {name: scaled(gain, g) + scaled(bend, torch.tanh(g)) for name, g in grads.items()}, state


@pytest.mark.parametrize(("engine", "chunk"), ENGINES)
def test_rule_takes_meta_learned_tensors(engine: str, chunk: int | None) -> None:
    forward, theta, episodes = model_and_tasks()
    inner = InnerLoop(LR, STEPS, engine=engine, task_chunk=chunk, rule=Learned())  # type: ignore[arg-type]
    meta = {"gain": torch.tensor(0.7).double(), "bend": torch.tensor(0.4).double()}
    result = meta_gradient(forward, theta, episodes, inner, loss=loss_of_both, meta=meta)

    def query_loss(meta: Params) -> Tensor:
        return meta_gradient(forward, theta, episodes, inner, loss=loss_of_both, meta=meta).loss

    assert gradcheck.directional(query_loss, meta, gradient_at_x=result.meta_grads).error < 1e-8
    reference = meta_gradient(forward, theta, episodes, replace(inner, engine="unroll"), loss=loss_of_both, meta=meta)
    assert relative_error(result.grads, reference.grads) < 1e-12


def test_memory_of_adjoint_with_meta_is_flat_in_the_number_of_steps() -> None:
    forward, theta, episodes = model_and_tasks()
    peaks = {}
    for engine in ("unroll", "adjoint"):
        for steps in (2, 40):
            inner = InnerLoop(0.01, steps, engine=engine, checkpoint_every=max(1, round(steps**0.5)))
            with PeakTensorMemory() as live:
                meta_gradient(forward, theta, episodes, inner, loss=weighted, query_loss=classify, meta=META)
            peaks[engine, steps] = live.peak
    copies = 12 * TASKS * sum(p.numel() for p in theta.values()) * 8  # of the weights: about two roots of K
    assert peaks["adjoint", 40] < 1.05 * peaks["adjoint", 2] + copies
    assert peaks["unroll", 40] > 8 * peaks["unroll", 2]


def of(**changes: Any) -> Callable[[], Episodes]:
    right = {"support_x": sentences(1), "support_y": labels(2), "query_x": sentences(3), "query_y": labels(4)}
    return lambda: Episodes(**{**right, **changes})


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            of(support_x={**sentences(1), "mask": torch.ones(TASKS, 2, 7)}),
            ValueError,
            r"support_x\['mask'\].*same numbers",
        ),
        (
            of(query_x={**sentences(3), "mask": [1.0]}),
            TypeError,
            r"query_x\['mask'\]\[0\] is float and must be a Tensor",
        ),
        (of(query_x={}), ValueError, r"query_x holds no tensor"),
        (
            of(query_x=tree_map(lambda x: x[:2], sentences(3)), query_y=labels(4)[:2]),
            ValueError,
            r"same number of tasks T",
        ),
    ],
)
def test_wrong_leaf_is_named(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("meta", "error", "message"),
    [
        (
            {**META, "wieghts": torch.ones(1)},
            ValueError,
            r"nothing takes 'wieghts'.*def loss\(prediction, y, wieghts\)",
        ),
        ({**META, "decay": 3}, TypeError, r"meta\['decay'\] is int"),
        ([1], TypeError, r"meta is list and must be a dictionary"),
    ],
)
def test_wrong_meta_raises(meta: Any, error: type[Exception], message: str) -> None:
    forward, theta, episodes = model_and_tasks()
    with pytest.raises(error, match=message):
        meta_gradient(forward, theta, episodes, InnerLoop(LR, 1), loss=weighted, query_loss=classify, meta=meta)


def test_examples_that_the_model_does_not_take_raise() -> None:
    forward, theta, episodes = model_and_tasks()
    x = episodes.support_x["features"]
    with pytest.raises(
        TypeError, match=r"Text\.forward\(.*is given x \(missing a required argument: 'mask'\).*a tuple"
    ):
        meta_gradient(forward, theta, Episodes(x, labels(2), x, labels(4)), InnerLoop(LR, 1), loss=classify)
