"""Random calls of ``adapt``, ``predict`` and ``meta_gradient``: valid ones, with a few things changed at random.

A right answer is that of one task after another, without ``vmap`` and without engines; else an error of metalearn.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from metalearn import Episodes, Forward, InnerLoop, Params, adapt, functionalize, meta_gradient, predict
from tests.faults.cases import assert_raised_by_metalearn, cases, check_random_cases

TASKS, WAYS, FEATURES = 3, 3, 4
FIELDS = ("support_x", "support_y", "query_x", "query_y")


def forward_by_hand(params: Params, x: Tensor) -> Tensor:
    return x.flatten(1) @ params["w"] + params["b"]


def linear() -> tuple[Forward, Params]:
    return functionalize(nn.Sequential(nn.Flatten(), nn.Linear(FEATURES, WAYS)))


def convolution() -> tuple[Forward, Params]:
    norm = nn.BatchNorm2d(2, track_running_stats=False)
    return functionalize(
        nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 2, 2), norm, nn.Tanh(), nn.Flatten(), nn.Linear(2, WAYS))
    )


def embedding() -> tuple[Forward, Params]:
    return functionalize(nn.Sequential(nn.Embedding(10, 2), nn.Flatten(), nn.Tanh(), nn.Linear(2 * FEATURES, WAYS)))


def by_hand() -> tuple[Forward, Params]:
    return forward_by_hand, {"w": torch.randn(FEATURES, WAYS), "b": torch.zeros(WAYS)}


MODELS = {"linear": linear, "convolution": convolution, "embedding": embedding, "by hand": by_hand}
LOSSES: dict[str, Any] = {
    "cross_entropy": cross_entropy,
    "mse": mse_loss,
    "one an example": functools.partial(cross_entropy, reduction="none"),
    "no tensor": lambda prediction, target: 0.5,
    "its items": lambda prediction, target: prediction[target].mean(),
}

Change = Callable[[Tensor], Any]


def replace_first(value: float) -> Change:
    def change(t: Tensor) -> Tensor:
        t = t.clone()
        t.view(-1)[:1] = value
        return t

    return change


def in_inference_mode(t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.clone()


DTYPES = (torch.float16, torch.bfloat16, torch.complex64, torch.int64, torch.int32, torch.uint8, torch.bool)
CHANGES: dict[str, Change] = {
    "float32": Tensor.float,
    "strided": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "expanded": lambda t: t[:1].expand_as(t),
    "with a gradient": lambda t: t.clone().requires_grad_() if t.is_floating_point() else t,
    **{str(dtype): functools.partial(Tensor.to, dtype=dtype) for dtype in DTYPES},
    **{str(value): replace_first(value) for value in (math.nan, math.inf, 1e30, -1, -100, 99)},
    "a dimension less": lambda t: t[0],
    "a dimension more": lambda t: t.unsqueeze(-1),
    "flat": Tensor.flatten,
    "a number": lambda t: t.sum(),
    "one": lambda t: t[:1],
    "none": lambda t: t[:0],
    "one each": lambda t: t[:, :1],
    "none each": lambda t: t[:, :0],
    "no features": lambda t: t[..., :0],
    "twice the features": lambda t: torch.cat([t, t], dim=-1),
    "numpy": lambda t: t.numpy(),
    "list": Tensor.tolist,
    "None": lambda t: None,
    "text": str,
    "meta": lambda t: t.to("meta"),
    "sparse": Tensor.to_sparse,
    "inference": in_inference_mode,
}


@dataclass(frozen=True)
class Case:
    """One call: the function, model, loss and settings, and changes to arguments that were valid."""

    call: str
    model: str
    loss: str
    settings: dict[str, Any]
    changes: list[tuple[str, str]]
    of_params: list[tuple[str, str]]
    seed: int


def settings() -> st.SearchStrategy[dict[str, Any]]:
    right: dict[str, Any] = {
        "lr": st.sampled_from([0.1, 0.5, 1, np.float64(0.2), 20.0]),
        "steps": st.sampled_from([0, 1, 2, 3, np.int64(2)]),
        "second_order": st.booleans(),
        "engine": st.sampled_from(["unroll", "checkpoint", "adjoint"]),
        "task_chunk": st.sampled_from([None, 1, 2, 3, 7, np.int64(2)]),
        "checkpoint_every": st.sampled_from([1, 2, 5]),
    }
    wrong: dict[str, list[Any]] = {
        "lr": [0, -1.0, math.nan, math.inf, "0.1", True, Fraction(1, 2), 10**400, None, torch.tensor(0.1), 1j],
        "steps": [-1, 1.5, "2", None, True, math.nan, torch.tensor(2), [1]],
        "second_order": ["false", None, torch.tensor(False), 2],
        "engine": ["auto", "Unroll", None, ["unroll"], {}],
        "task_chunk": [0, -1, 1.5, "2", True, 2**70],
        "checkpoint_every": [0, -3, None, "1", 2**70],
    }
    changed = [{key: value} for key, values in wrong.items() for value in values]
    return st.builds(
        lambda settings, change: settings | change,
        st.fixed_dictionaries(right),
        st.sampled_from([{}] * 9 * len(changed) + changed),
    )


OF_PARAMS = ["no such name", "left out", "empty", "list", "None", "text", "module"]


def calls() -> st.SearchStrategy[Case]:
    """Draw valid calls with up to two changes of tensors and one of the parameters."""
    change = st.tuples(st.sampled_from([*FIELDS, "all"]), st.sampled_from([*CHANGES]))
    of_params = st.tuples(
        st.integers(0, 1).map(str), st.one_of(st.sampled_from([*CHANGES]), st.sampled_from(OF_PARAMS))
    )
    return st.builds(
        Case,
        call=st.sampled_from(["meta_gradient", "meta_gradient", "adapt", "predict"]),
        model=st.sampled_from(sorted(MODELS)),
        loss=st.one_of(st.just("cross_entropy"), st.sampled_from(sorted(LOSSES))),
        settings=settings(),
        changes=st.lists(change, max_size=2),
        of_params=st.one_of(st.just([]), st.just([]), st.lists(of_params, max_size=1)),
        seed=st.integers(0, 3),
    )


def build(case: Case) -> tuple[Forward, Any, dict[str, Any]]:
    torch.manual_seed(case.seed)
    forward, params = MODELS[case.model]()
    theta: Any = {name: p.double() for name, p in params.items()}
    of_words = case.model == "embedding"
    tensors: dict[str, Any] = {}
    for kind, examples in (("support", 3), ("query", 6)):
        shape = (TASKS, examples)
        tensors[f"{kind}_x"] = (
            torch.randint(10, (*shape, FEATURES)) if of_words else torch.randn(*shape, FEATURES).double()
        )
        labels = torch.randint(WAYS, shape)
        tensors[f"{kind}_y"] = torch.randn(*shape, WAYS).double() if case.loss == "mse" else labels
    for field, change in case.changes:
        for name in FIELDS if field == "all" else [field]:
            if isinstance(tensors[name], Tensor):
                tensors[name] = CHANGES[change](tensors[name])
    for index, change in case.of_params:
        theta = change_params(theta, list(theta)[int(index)], change)
    return forward, theta, tensors


def change_params(theta: Params, name: str, change: str) -> Any:
    if change in CHANGES:
        return theta | {name: CHANGES[change](theta[name])}
    without = {other: p for other, p in theta.items() if other != name}
    whole: dict[str, Any] = {
        "empty": {},
        "list": list(theta.values()),
        "None": None,
        "text": "theta",
        "module": nn.Linear(2, 2),
    }
    return {"no such name": {**without, "nope": theta[name]}, "left out": without, **whole}[change]


NEEDED = {"adapt": FIELDS[:2], "predict": FIELDS[:3], "meta_gradient": FIELDS}
"""The tensors that each function takes."""
LAXER = r"same dtype|scalar type|Long or Byte|expanded size|expected bias|[Ii]nference tensor"
"""Errors of kernels whose formulas under ``vmap`` promote, broadcast or copy instead."""


def check_call(case: Case) -> None:
    """Check one call: the values of one task after another, or an error of metalearn."""
    try:
        forward, theta, tensors = build(case)
    except (RuntimeError, IndexError, TypeError):
        return  # the changes exclude each other: there is no such case
    try:
        got = call_metalearn(case, forward, theta, tensors)
    except Exception as error:
        if not (case.model == "by hand" and isinstance(error, KeyError)):  # which this model raises itself
            assert_raised_by_metalearn(error)
        return
    try:
        expected = compute_task_by_task(case, forward, theta, tensors)
    except RuntimeError as error:
        if not re.search(LAXER, str(error)):
            raise AssertionError(f"answered where one task alone is refused: {error}") from error
        return
    assert_equal(got, expected)


def call_metalearn(case: Case, forward: Forward, theta: Any, tensors: dict[str, Any]) -> Params:
    inner, loss = InnerLoop(**case.settings), LOSSES[case.loss]
    support = tensors["support_x"], tensors["support_y"]
    if case.call == "adapt":
        return adapt(forward, theta, *support, inner, loss=loss)
    if case.call == "predict":
        fast = adapt(forward, theta, *support, InnerLoop(lr=0.1, steps=0), loss=loss)
        return {"predictions": predict(forward, fast, tensors["query_x"])}
    result = meta_gradient(forward, theta, Episodes(**tensors), inner, loss=loss)
    assert not any(
        t.requires_grad for t in (result.loss, result.predictions, result.support_loss, *result.grads.values())
    )
    assert result.support_loss.shape == (inner.steps,)
    return {"loss": result.loss, "predictions": result.predictions, **{f"d {n}": g for n, g in result.grads.items()}}


def compute_task_by_task(case: Case, forward: Forward, params: Params, tensors: dict[str, Any]) -> Params:
    """Compute the same by the textbook: one task after another, all inner steps under ``create_graph``."""
    theta = {name: p.detach().requires_grad_() for name, p in params.items()}
    inner, loss = InnerLoop(**case.settings), LOSSES[case.loss]
    losses, predictions, adapted = [], [], []
    for t in range(len(tensors["support_x"])):
        task = {field: tensor[t].detach() for field, tensor in tensors.items() if field in NEEDED[case.call]}
        fast = dict(theta)
        for _ in range(0 if case.call == "predict" else inner.steps):
            at = loss(forward(fast, task["support_x"]), task["support_y"])
            grads = torch.autograd.grad(
                at, list(fast.values()), create_graph=inner.second_order, retain_graph=True, materialize_grads=True
            )
            fast = {name: w - inner.lr * g for (name, w), g in zip(fast.items(), grads, strict=True)}
        adapted.append(fast)
        if case.call != "adapt":
            predictions.append(forward(fast, task["query_x"]))
        if case.call == "meta_gradient":
            losses.append(loss(predictions[-1], task["query_y"]))
    if case.call == "adapt":
        return {name: torch.stack([fast[name] for fast in adapted]) for name in theta}
    if case.call == "predict":
        return {"predictions": torch.stack(predictions)}
    mean = torch.stack(losses).mean()
    grads = torch.autograd.grad(mean, list(theta.values()), materialize_grads=True)
    named = {f"d {name}": g for name, g in zip(theta, grads, strict=True)}
    return {"loss": mean, "predictions": torch.stack(predictions), **named}


def assert_equal(got: Params, expected: Params) -> None:
    assert got.keys() == expected.keys()
    scale = max((right.abs().nan_to_num().max().item() for right in expected.values() if right.numel()), default=0.0)
    for name, right in expected.items():
        answer = got[name].detach()
        assert answer.shape == right.shape, f"{name}: {tuple(answer.shape)} and not {tuple(right.shape)}"
        assert answer.dtype == right.dtype, f"{name}: {answer.dtype} and not {right.dtype}"
        if all(t.dtype == torch.float64 for t in expected.values()):
            torch.testing.assert_close(answer, right.detach(), rtol=1e-6, atol=1e-6 * (1 + scale), equal_nan=True)


@pytest.mark.fault(
    "tensors, parameters and settings at random, by way of `Episodes`, `adapt`, `predict`, `meta_gradient`",
    "the answer of one task after the other, or an error of ours that names what was wrong",
    cases=50,
)
@pytest.mark.parametrize("number", cases(range(10), quick=[0, 1]))
@pytest.mark.filterwarnings("ignore")  # torch's, of the changes
def test_random_calls(number: int) -> None:
    check_random_cases(calls(), check_call, n=50, number=number)
