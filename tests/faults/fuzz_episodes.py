"""Tensors, parameters and settings that do not belong together, through ``adapt``, ``predict`` and ``meta_gradient``.

A right answer is that of one task after the other, without ``vmap`` and without engines; else one of our errors.
"""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch

from metalearn import Episodes, Forward, InnerLoop, Params, adapt, meta_gradient, predict
from tests.faults.fuzz_calls import FIELDS, LOSSES, Case, made
from tests.faults.raised import must_be_ours

NEEDED = {"adapt": FIELDS[:2], "predict": FIELDS[:3], "meta_gradient": FIELDS}
"""What each call is given."""
LAXER = r"same dtype|scalar type|Long or Byte|expanded size|expected bias|[Ii]nference tensor"
"""What kernels refuse and their formulas under ``vmap`` promote, broadcast or copy."""


def hold(case: Case) -> None:
    """A right answer or one of our errors; what torch warns of is not asked."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _hold(case)


def _hold(case: Case) -> None:
    try:
        forward, theta, tensors = made(case)
    except (RuntimeError, IndexError, TypeError):
        return  # the changes exclude each other: there is no such case
    try:
        got = _called(case, forward, theta, tensors)
    except Exception as error:
        if not (case.model == "by hand" and isinstance(error, KeyError)):  # which this model raises itself
            must_be_ours(error)
        return
    try:
        expected = _one_by_one(case, forward, theta, tensors)
    except RuntimeError as error:
        if not re.search(LAXER, str(error)):
            raise AssertionError(f"answered where one task alone is refused: {error}") from error
        return
    _compare(got, expected)


def _called(case: Case, forward: Forward, theta: Any, tensors: dict[str, Any]) -> Params:
    """What the library answers, as one dictionary."""
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


def _one_by_one(case: Case, forward: Forward, params: Params, tensors: dict[str, Any]) -> Params:
    """The same by the textbook: one task after the other, all inner steps under ``create_graph``."""
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


def _compare(got: Params, expected: Params) -> None:
    assert got.keys() == expected.keys()
    scale = max((right.abs().nan_to_num().max().item() for right in expected.values() if right.numel()), default=0.0)
    for name, right in expected.items():
        answer = got[name].detach()
        assert answer.shape == right.shape, f"{name}: {tuple(answer.shape)} and not {tuple(right.shape)}"
        assert answer.dtype == right.dtype, f"{name}: {answer.dtype} and not {right.dtype}"
        if all(t.dtype == torch.float64 for t in expected.values()):
            torch.testing.assert_close(answer, right.detach(), rtol=1e-6, atol=1e-6 * (1 + scale), equal_nan=True)
