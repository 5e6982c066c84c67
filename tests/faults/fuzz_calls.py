"""Random calls of ``adapt``, ``predict`` and ``meta_gradient``: right ones, with a few things changed at random."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from metalearn import Forward, Params, functionalize

TASKS, WAYS, FEATURES = 3, 3, 4
FIELDS = ("support_x", "support_y", "query_x", "query_y")


def _plain(params: Params, x: Tensor) -> Tensor:
    return x.flatten(1) @ params["w"] + params["b"]


def _linear() -> tuple[Forward, Params]:
    return functionalize(nn.Sequential(nn.Flatten(), nn.Linear(FEATURES, WAYS)))


def _convolution() -> tuple[Forward, Params]:
    norm = nn.BatchNorm2d(2, track_running_stats=False)
    return functionalize(
        nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 2, 2), norm, nn.Tanh(), nn.Flatten(), nn.Linear(2, WAYS))
    )


def _embedding() -> tuple[Forward, Params]:
    return functionalize(nn.Sequential(nn.Embedding(10, 2), nn.Flatten(), nn.Tanh(), nn.Linear(2 * FEATURES, WAYS)))


def _by_hand() -> tuple[Forward, Params]:
    return _plain, {"w": torch.randn(FEATURES, WAYS), "b": torch.zeros(WAYS)}


MODELS = {"linear": _linear, "convolution": _convolution, "embedding": _embedding, "by hand": _by_hand}
LOSSES: dict[str, Any] = {
    "cross_entropy": cross_entropy,
    "mse": mse_loss,
    "one an example": functools.partial(cross_entropy, reduction="none"),
    "no tensor": lambda prediction, target: 0.5,
    "its items": lambda prediction, target: prediction[target].mean(),
}

Change = Callable[[Tensor], Any]


def _with(value: float) -> Change:
    def change(t: Tensor) -> Tensor:
        t = t.clone()
        t.view(-1)[:1] = value
        return t

    return change


def _in_inference_mode(t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.clone()


DTYPES = (torch.float16, torch.bfloat16, torch.complex64, torch.int64, torch.int32, torch.uint8, torch.bool)
CHANGES: dict[str, Change] = {
    "float32": Tensor.float,
    "strided": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "expanded": lambda t: t[:1].expand_as(t),
    "with a gradient": lambda t: t.clone().requires_grad_() if t.is_floating_point() else t,
    **{str(dtype): functools.partial(Tensor.to, dtype=dtype) for dtype in DTYPES},
    **{str(value): _with(value) for value in (math.nan, math.inf, 1e30, -1, -100, 99)},
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
    "inference": _in_inference_mode,
}


@dataclass(frozen=True)
class Case:
    """One call: what is called, with which model, loss, settings, and changes to what would be right."""

    call: str
    model: str
    loss: str
    settings: dict[str, Any]
    changes: list[tuple[str, str]]
    of_params: list[tuple[str, str]]
    seed: int


def _settings() -> st.SearchStrategy[dict[str, Any]]:
    right: dict[str, Any] = {
        "lr": st.sampled_from([0.1, 0.5, 1, np.float64(0.2), 20.0]),
        "steps": st.sampled_from([0, 1, 2, 3, np.int64(2)]),
        "second_order": st.booleans(),
        "engine": st.sampled_from(["unroll", "checkpoint", "adjoint"]),
        "task_chunk": st.sampled_from([None, 1, 2, 3, 7, np.int64(2)]),
        "snapshot_every": st.sampled_from([1, 2, 5]),
    }
    wrong: dict[str, list[Any]] = {
        "lr": [0, -1.0, math.nan, math.inf, "0.1", True, Fraction(1, 2), 10**400, None, torch.tensor(0.1), 1j],
        "steps": [-1, 1.5, "2", None, True, math.nan, torch.tensor(2), [1]],
        "second_order": ["false", None, torch.tensor(False), 2],
        "engine": ["auto", "Unroll", None, ["unroll"], {}],
        "task_chunk": [0, -1, 1.5, "2", True, 2**70],
        "snapshot_every": [0, -3, None, "1", 2**70],
    }
    changed = [{key: value} for key, values in wrong.items() for value in values]
    return st.builds(
        lambda settings, change: settings | change,
        st.fixed_dictionaries(right),
        st.sampled_from([{}] * 9 * len(changed) + changed),
    )


OF_PARAMS = ["no such name", "left out", "empty", "list", "None", "text", "module"]


def cases() -> st.SearchStrategy[Case]:
    """Calls that are right but for up to two changes of tensors and one of the parameters."""
    change = st.tuples(st.sampled_from([*FIELDS, "all"]), st.sampled_from([*CHANGES]))
    of_params = st.tuples(
        st.integers(0, 1).map(str), st.one_of(st.sampled_from([*CHANGES]), st.sampled_from(OF_PARAMS))
    )
    return st.builds(
        Case,
        call=st.sampled_from(["meta_gradient", "meta_gradient", "adapt", "predict"]),
        model=st.sampled_from(sorted(MODELS)),
        loss=st.one_of(st.just("cross_entropy"), st.sampled_from(sorted(LOSSES))),
        settings=_settings(),
        changes=st.lists(change, max_size=2),
        of_params=st.one_of(st.just([]), st.just([]), st.lists(of_params, max_size=1)),
        seed=st.integers(0, 3),
    )


def made(case: Case) -> tuple[Forward, Any, dict[str, Any]]:
    """Model, parameters and tensors, changed as the case says."""
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
        theta = _changed_params(theta, list(theta)[int(index)], change)
    return forward, theta, tensors


def _changed_params(theta: Params, name: str, change: str) -> Any:
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
