"""torch's own database of operations, as functions to differentiate and as models to meta-learn.

``python -m tests.core.operations.database`` prints which operations are unsupported or wrong, by mode and engine.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from metalearn import Episodes, InnerLoop, MetaGradient, Params, meta_gradient
from metalearn.core.errors import NonFiniteError
from metalearn.derivatives import HVP_MODES, hvp
from metalearn.metagrad import ENGINES

UNSUPPORTED = Path(__file__).with_name("unsupported.json")
UNSUPPORTED_ERRORS = (NotImplementedError, ValueError, NonFiniteError)
_DTYPE = torch.float64
_RANDOM = ("dropout", "rrelu", "bernoulli", "normal", "rand", "multinomial", "fractional", "empty", "lowrank", "nested")
_DROPS = ("nn.functional.multi_head_attention_forward", "nn.functional.scaled_dot_product_attention")
_LARGEST = 2000  # numbers
_SAMPLES = 8
_ALLOWED, _ALLOWED_OF_DIFFERENCES = 1e-5, 1e-2

_CONVENTIONS = {
    "reads one triangle, and is differentiated as if the matrix were symmetric": (
        *("linalg.cholesky", "linalg.cholesky_ex", "cholesky_inverse", "cholesky_solve", "linalg.eigh"),
        *("linalg.eigvalsh", "linalg.matrix_sqrth", "linalg.pinv.hermitian"),
    ),
    "samples with indices or strides twice, of which the last is kept": (
        *("as_strided_scatter", "nn.functional.max_unpool1d", "nn.functional.max_unpool2d"),
        "nn.functional.max_unpool3d",
    ),
    "rounds, in steps that differences see": ("bfloat16", "half", "chalf", "float", "cfloat", "cov"),
    "a kink at the sample": (
        *("nn.functional.cosine_embedding_loss", "nn.functional.hinge_embedding_loss"),
        *("linalg.norm.subgradients_at_zero", "nn.functional.normalize", "native_layer_norm", "corrcoef"),
    ),
}
"""Operations compared with double backward only, and why differences disagree."""


@dataclass(frozen=True)
class Case:
    """An operation with one of its samples: a scalar function of a dictionary of float64 tensors."""

    operation: str
    function: Callable[[Params], Tensor]
    point: Params

    def direction(self) -> Params:
        generator = torch.Generator().manual_seed(1)
        return {n: torch.randn(t.shape, generator=generator, dtype=t.dtype) for n, t in self.point.items()}


@cache
def operations() -> dict[str, Any]:
    """Return by name each operation that has a second derivative according to torch and draws no random numbers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    return {
        f"{op.name}{'.' if op.variant_test_name else ''}{op.variant_test_name}": op
        for op in op_db
        if _DTYPE in op.dtypes and op.supports_autograd and op.supports_gradgrad
        if op.name not in _DROPS and not any(word in op.name for word in _RANDOM)
    }


def cases(name: str) -> Iterator[Case]:
    """Yield the operation's samples whose double backward torch can compute and is finite."""
    op = operations()[name]
    torch.manual_seed(0)
    samples = list(op.sample_inputs("cpu", _DTYPE, requires_grad=True))
    for sample in samples[:: max(1, len(samples) // _SAMPLES)]:
        flat, spec = tree_flatten(((sample.input, *sample.args), sample.kwargs))
        free = [i for i, a in enumerate(flat) if _is_free(a)]
        if free and sum(flat[i].numel() for i in free) <= _LARGEST:
            point = {f"p{i}": flat[i].detach().clone() for i in free}
            yield Case(name, _scalar(op, sample, flat, spec), point)


def _is_free(argument: object) -> bool:
    if not isinstance(argument, Tensor) or argument.is_nested or argument.layout != torch.strided:
        return False
    return argument.dtype == _DTYPE and argument.requires_grad and argument.numel() > 0


def _scalar(op: Any, sample: Any, flat: list[Any], spec: Any) -> Callable[[Params], Tensor]:
    constants = [a.detach() if isinstance(a, Tensor) else a for a in flat]

    def function(params: Params) -> Tensor:
        args, kwargs = tree_unflatten([params.get(f"p{i}", a) for i, a in enumerate(constants)], spec)
        out = op(*args, **kwargs)
        if sample.output_process_fn_grad is not None:
            out = sample.output_process_fn_grad(out)
        total = torch.zeros((), dtype=_DTYPE)
        for part in tree_leaves(out):
            if isinstance(part, Tensor) and (part.is_floating_point() or part.is_complex()):
                dense = part.to_dense() if part.is_sparse else part
                real = (torch.view_as_real(dense.resolve_conj()) if dense.is_complex() else dense).to(_DTYPE)
                weights = torch.linspace(-1, 1.3, real.numel(), dtype=_DTYPE).reshape(real.shape)
                total = total + (real * weights).sum() + 0.3 * (real * real).sum()
        return total

    return function


def _leaves(case: Case) -> Params:
    return {n: t.clone().requires_grad_() for n, t in case.point.items()}


def _grad(value: Tensor, at: Params, *, create_graph: bool = False) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, list(at.values()), create_graph=create_graph, materialize_grads=True)


def double_backward(case: Case, v: Params) -> Params | None:
    """Return H v by plain autograd; ``None`` if torch has none, or it is not finite."""
    at = _leaves(case)
    try:
        grads = _grad(case.function(at), at, create_graph=True)
        curved = [(g, v[n]) for g, n in zip(grads, at, strict=True) if g.requires_grad]
        if not curved:
            return {n: torch.zeros_like(t) for n, t in case.point.items()}
        gs, vs = zip(*curved, strict=True)
        products = torch.autograd.grad(gs, list(at.values()), vs, materialize_grads=True)
    except (RuntimeError, ValueError):
        return None
    return dict(zip(at, products, strict=True)) if all(torch.isfinite(p).all() for p in products) else None


def differences(case: Case, v: Params, h: float = 1e-6) -> Params:
    def gradient(step: float) -> tuple[Tensor, ...]:
        at = {n: (t + step * v[n]).requires_grad_() for n, t in case.point.items()}
        return _grad(case.function(at), at)

    pairs = zip(gradient(h), gradient(-h), strict=True)
    return {n: (a - b) / (2 * h) for n, (a, b) in zip(case.point, pairs, strict=True)}


def error(got: Params, want: Params) -> float:
    """Return the largest difference, relative to the largest entry."""
    scale = max(max(float(w.abs().max()) for w in want.values()), 1e-8)
    return max(float((got[n] - w).abs().nan_to_num(nan=torch.inf).max()) for n, w in want.items()) / scale


def hvp_verdict(name: str, mode: str) -> str:
    """Return ``right``, ``unsupported`` or the error of one mode over all samples of an operation.

    The reference is differences of the gradient, as torch's own double backward is wrong in places.
    """
    verdict = "right"
    for case in cases(name):
        v = case.direction()
        want = double_backward(case, v)
        if want is None:
            continue
        try:
            got = hvp(case.function, case.point, v, mode=mode)
        except UNSUPPORTED_ERRORS:
            verdict = "unsupported"
            continue
        if any(name in names for names in _CONVENTIONS.values()):
            wrong, allowed = error(got, want), _ALLOWED
        else:
            wrong, allowed = error(got, differences(case, v)), _ALLOWED_OF_DIFFERENCES
        if wrong > allowed:
            return f"wrong by {wrong:.1e}"
    return verdict


def engine_verdict(name: str, engine: str, *, second_order: bool = True) -> str:
    """Return a verdict like ``hvp_verdict``, for the operation as the model of two tasks, against a loop."""
    verdict = "right"
    x = torch.tensor([[1.0, 0.5], [-0.7, 1.2]], dtype=_DTYPE)
    y = torch.zeros_like(x)
    for case in cases(name):
        steepest = _steepest(case)
        if steepest is None:
            continue
        inner = InnerLoop(lr=1e-2 / max(steepest, 1e-3), steps=2, engine=engine, second_order=second_order)
        want = _loop_over_tasks(case, x, inner)
        if want is None:
            continue

        def forward(params: Params, x: Tensor, case: Case = case) -> Tensor:
            return case.function(params) * x

        def result(params: Params, forward: Any = forward, inner: InnerLoop = inner) -> MetaGradient:
            return meta_gradient(forward, params, Episodes(x, y, x, y), inner, loss=lambda p, _: p.mean())

        try:
            got = result(case.point).grads
        except UNSUPPORTED_ERRORS:
            verdict = "unsupported"
            continue
        if error(got, want) > _ALLOWED and not (second_order and _agrees_with_differences(result, case, got)):
            return f"wrong by {error(got, want):.1e}"
    return verdict


def _agrees_with_differences(result: Callable[[Params], MetaGradient], case: Case, got: Params) -> bool:
    """Return whether <got, v> is the slope of the meta-objective, where double backward is wrong."""
    v, h = case.direction(), 1e-5
    ahead, behind = (result({n: t + s * v[n] for n, t in case.point.items()}).loss for s in (h, -h))
    slope = sum(float((g * v[n]).sum()) for n, g in got.items())
    return abs(float(ahead - behind) / (2 * h) - slope) <= _ALLOWED_OF_DIFFERENCES * abs(slope)


def _steepest(case: Case) -> float | None:
    """Return the largest gradient entry; ``None`` if the function is constant, not finite, or raises."""
    at = _leaves(case)
    try:
        value = case.function(at)
        if not (value.requires_grad and torch.isfinite(value)):
            return None
        grads = torch.autograd.grad(value, list(at.values()), allow_unused=True)
    except (RuntimeError, ValueError):
        return None
    largest = max((float(g.abs().max()) for g in grads if g is not None), default=float("inf"))
    return largest if largest < 1e8 else None


def _loop_over_tasks(case: Case, x: Tensor, inner: InnerLoop) -> Params | None:
    at = _leaves(case)
    total = torch.zeros((), dtype=_DTYPE)
    try:
        for own in x:
            fast = dict(at)
            for _ in range(inner.steps):
                grads = _grad((case.function(fast) * own).mean(), fast, create_graph=inner.second_order)
                fast = {n: w - inner.lr * g for (n, w), g in zip(fast.items(), grads, strict=True)}
            total = total + (case.function(fast) * own).mean() / len(x)
        grads = _grad(total, at)
    except (RuntimeError, ValueError):
        return None
    return dict(zip(at, grads, strict=True)) if all(torch.isfinite(g).all() for g in grads) else None


COLUMNS: dict[str, Callable[[str], str]] = {
    **{f"hvp {mode}": partial(hvp_verdict, mode=mode) for mode in HVP_MODES},
    **{f"engine {engine}": partial(engine_verdict, engine=engine) for engine in ENGINES},
    "engine unroll, first order": partial(engine_verdict, engine="unroll", second_order=False),
}
"""Every way to differentiate an operation."""


def main() -> None:
    chosen = sys.argv[1:] or list(operations())
    unsupported: dict[str, list[str]] = {column: [] for column in COLUMNS}
    for name in chosen:
        for column, verdict in COLUMNS.items():
            if (outcome := verdict(name)) == "unsupported":
                unsupported[column].append(name)
            elif outcome != "right":
                print(f"WRONG  {column}: {name}: {outcome}", flush=True)
    print(json.dumps({"torch": torch.__version__, "operations": len(chosen), "unsupported": unsupported}, indent=1))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
