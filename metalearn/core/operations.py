"""Operations whose derivatives torch gets wrong, done right or refused by name.

``CorrectedOperations`` is entered around every model, loss and function that is differentiated here. It sees each call
by name and replaces those in its table:

    corrected      everywhere: the same values, with derivatives that are right
    FORWARD_MODE   where a tangent passes: Hessian-vector products by forward over reverse, and the engine ``adjoint``
    NESTED         where the forward-mode formula itself is differentiated: reverse over forward, forward over forward

How each was found: ``tests/operations`` takes torch's own database of operations through every mode and engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_batchedtensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Handler = Callable[..., Any]
"""``handler(func, *args, **kwargs)``: what is computed in place of ``func(*args, **kwargs)``."""


class CorrectedOperations(TorchFunctionMode):
    """A context in which operations of the tables are replaced.

    Args:
        tables: handlers by the name of an operation, beside those that are corrected everywhere; the last one wins.
        kernels: functions that are tried first, by the operation that they stand for; ``NotImplemented`` declines.
    """

    def __init__(self, *tables: Mapping[str, Handler], kernels: Mapping[Any, Callable[..., Any]] | None = None) -> None:
        super().__init__()
        self._handlers: dict[str, Handler] = dict(_CORRECTED)
        for table in tables:
            self._handlers |= table
        self._kernels = kernels or {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kernel = self._kernels.get(func)
        if kernel is not None and (out := kernel(*args, **kwargs)) is not NotImplemented:
            return out
        handler = self._handlers.get(operation_name(func))
        return func(*args, **kwargs) if handler is None else handler(func, *args, **kwargs)


def operation_name(func: Any) -> str:
    """Return one name for an operation, be it a function, a method, or of ``torch.linalg``, ``special`` or ``ops``."""
    if func not in _NAMES:
        name: str = getattr(func, "__name__", "")
        _NAMES[func] = name.partition(".")[0].removeprefix("linalg_").removeprefix("special_")
    return _NAMES[func]


_NAMES: dict[Any, str] = {}


def refuse(reason: str) -> Handler:
    """Return a handler that raises ``NotImplementedError``: the operation's name, and the reason."""

    def handler(func: Any, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{operation_name(func)}: {reason}")

    return handler


def _under_vmap(reason: str) -> Handler:
    """Return a handler that refuses as ``refuse``, where a tensor is batched."""
    refused = refuse(reason)

    def handler(func: Any, *args: Any, **kwargs: Any) -> Any:
        batched = any(isinstance(a, Tensor) and is_batchedtensor(a) for a in (*args, *kwargs.values()))
        return (refused if batched else _as_it_is)(func, *args, **kwargs)

    return handler


def _property(func: Any, tensor: Tensor) -> Any:
    """Answer what a model asks of a batched tensor's place in the graph, on which ``vmap`` has no say.

    ``requires_grad`` is false there whatever has been computed; a ``grad_fn`` and hooks on it are dropped.
    """
    if not is_batchedtensor(tensor):
        return func(tensor)
    if func in _PLACES_IN_THE_GRAPH:
        raise NotImplementedError("grad_fn and is_leaf of a tensor that torch.vmap has batched")
    if func == _REQUIRES_GRAD:
        while is_batchedtensor(tensor):
            tensor = get_unwrapped(tensor)
    return func(tensor)


_REQUIRES_GRAD: Any = Tensor.requires_grad.__get__  # type: ignore[attr-defined]
_PLACES_IN_THE_GRAPH = tuple(vars(torch._C.TensorBase)[name].__get__ for name in ("grad_fn", "is_leaf"))
_DATA: Any = (Tensor.data.__get__, Tensor.data.__set__)  # type: ignore[attr-defined]


def _weight_norm(func: Any, v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """By its formula: the second derivative of torch's fused kernel is off by 8 to 48%."""
    others = [d for d in range(v.ndim) if d != dim]  # dim=-1 is torch's for the norm of all entries
    norm = torch.linalg.vector_norm(v) if dim == -1 else torch.linalg.vector_norm(v, dim=others, keepdim=True)
    weight: Tensor = v * (g / norm)
    return weight


def _linear_cross_entropy(func: Any, *args: Any, options: Any = None, **kwargs: Any) -> Any:
    """In one piece: ``options`` cuts it into chunks, whose second derivative is lost (and the first under ``vmap``)."""
    return func(*args, **kwargs)


def _sinc(func: Any, x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """By its series near 0, where torch's second derivative is 0/0."""
    if out is not None:
        result: Tensor = func(x, out=out)  # which autograd refuses
        return result
    z = torch.pi * x
    small = z.abs() < 1e-2
    square = torch.where(small, z * z, 0.0)
    series = 1 - square / 6 * (1 - square / 20 * (1 - square / 42 * (1 - square / 72)))
    away = torch.where(small, 1.0, z)
    return torch.where(small, series, torch.sin(away) / away)


def _embedding(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Let no gradient into the row of padding, in any task; and none be sparse, which has no second derivative.

    torch's batching rule stacks the tasks' rows and goes on to leave out row ``padding_idx`` of the first task alone;
    its forward mode lets a tangent of that row through.
    """
    bound = (_bind_functional if func is functional.embedding else _bind_torch)(*args, **kwargs)
    words, weight, padding = bound["input"], bound["weight"], bound["padding_idx"]
    if bound["max_norm"] is not None:
        raise ValueError(
            f"embedding: max_norm={bound['max_norm']} rescales the weights in place at every call, which no gradient "
            "goes through and all tasks would share. Build nn.Embedding without max_norm, and normalise the rows in "
            "the model: torch.renorm(weight, 2, 0, max_norm)."
        )
    vectors = functional.embedding(words, weight, scale_grad_by_freq=bound["scale_grad_by_freq"])
    if padding is None:
        return vectors
    if not -weight.shape[0] <= padding < weight.shape[0]:
        return func(*args, **kwargs)  # which refuses it
    return torch.where((words == padding % weight.shape[0]).unsqueeze(-1), vectors.detach(), vectors)


def _bind_functional(
    input: Tensor,  # noqa: A002  # as torch calls it
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> dict[str, Any]:
    return locals()


def _bind_torch(
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> dict[str, Any]:
    padding = None if padding_idx < 0 else padding_idx
    return _bind_functional(indices, weight, padding, scale_grad_by_freq=scale_grad_by_freq)


def _hardsigmoid(func: Any, x: Tensor, inplace: bool = False) -> Tensor:
    """By its formula, as torch's kernel has no second derivative; with the kernel's slope, 1/6 rounded to float32."""
    if inplace:
        written: Tensor = func(x, inplace)
        return written
    clipped = functional.relu6(x + 3)
    sloped = _SIXTH * clipped
    return sloped + (clipped / 6 - sloped).detach()


_SIXTH = torch.tensor(1 / 6, dtype=torch.float32).item()

_CORRECTED: dict[str, Handler] = {
    "_weight_norm": _weight_norm,
    "linear_cross_entropy": _linear_cross_entropy,
    "sinc": _sinc,
    "sinc_": lambda func, x: x.copy_(_sinc(func, x)),
    "embedding": _embedding,
    "hardsigmoid": _hardsigmoid,
    **dict.fromkeys(
        ("as_strided", "as_strided_", "as_strided_copy", "select_scatter"),
        _under_vmap("its derivative is wrong under torch.vmap"),
    ),
    "register_hook": _under_vmap("torch.vmap never calls a hook"),
    "__get__": _property,
}


def _mse_loss(func: Any, input: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: A002
    """Take the mean outside: torch's formula for it writes to the zeros that stand for no tangent (pytorch #112013)."""
    options = {name: value for name, value in kwargs.items() if value is not None}
    if func is not functional.mse_loss or args or options not in ({}, {"reduction": "mean"}):
        return func(input, target, *args, **kwargs)
    return func(input, target, reduction="none").mean()


def _symmetric(func: Any, a: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Take the symmetric part of a tangent, as reverse mode takes that of a gradient; torch reads a triangle of it."""
    symmetric = (a + a.mH) / 2
    return func(a.detach() + (symmetric - symmetric.detach()), *args, **kwargs)


def _pinv(func: Any, *args: Any, **kwargs: Any) -> Any:
    hermitian = kwargs.get("hermitian", False) or any(arg is True for arg in args)
    return (_READS_A_TRIANGLE if hermitian else _as_it_is)(func, *args, **kwargs)


def _as_it_is(func: Any, *args: Any, **kwargs: Any) -> Any:
    return func(*args, **kwargs)


def _norm(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Make the derivative of a norm of 0 NaN, as double backward has it: torch's formula goes on with 0 there."""
    norm = func(*args, **kwargs)
    position = 2 if operation_name(func) in ("dist", "pairwise_distance") else 1
    order = kwargs.get("p", kwargs.get("ord", args[position] if len(args) > position else None))
    if order in (0, 1, float("inf"), -float("inf")):
        return norm  # these have a kink, and no curvature
    return torch.where(norm == 0, (norm * norm).sqrt(), norm)


def _std(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Take the root of the variance: torch's own formula has 0 for every derivative where that is 0."""
    return torch.var(*args, **kwargs).sqrt()


def _std_mean(func: Any, *args: Any, **kwargs: Any) -> Any:
    variance, mean = torch.var_mean(*args, **kwargs)
    return variance.sqrt(), mean


SECOND_DERIVATIVE: dict[str, Handler] = {"std": _std, "std_mean": _std_mean}
"""Where a second derivative is taken and no first."""


def _data(func: Any, *args: Any) -> Any:
    """Refuse ``.data``, of which a tangent is not taken away; other properties as everywhere."""
    if func in _DATA:
        raise NotImplementedError("forward mode does not stop at .data; use .detach() on what is constant")
    return _property(func, *args) if len(args) == 1 else func(*args)


def _scatter_reduce(func: Any, *args: Any, **kwargs: Any) -> Any:
    products = any(isinstance(arg, str) and arg == "prod" for arg in (*args, *kwargs.values()))
    return (_WRONG_FORMULA if products else _as_it_is)(func, *args, **kwargs)


_READS_A_TRIANGLE = refuse("with hermitian=True it reads one triangle, and torch's forward mode both")
_WRONG_FORMULA = refuse("torch's forward-mode formula for it is wrong")

_NORMS = (
    *("norm", "vector_norm", "matrix_norm", "frobenius_norm", "norm_except_dim"),
    *("dist", "pairwise_distance"),
)


def _batch_norm(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Refuse to write to running statistics, which makes of a model another function at every call."""
    names = _TORCHS_ORDER if func is torch.batch_norm else _FUNCTIONALS_ORDER
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if given.get("running_mean") is not None and (given.get("training") or given.get("use_input_stats")):
        raise ValueError(KEEPS_STATISTICS)
    return func(*args, **kwargs)


_TORCHS_ORDER = ("input", "weight", "bias", "running_mean", "running_var", "training")
_FUNCTIONALS_ORDER = ("input", "running_mean", "running_var", "weight", "bias", "training")
KEEPS_STATISTICS = (
    "the model writes to running statistics at every call, as BatchNorm does in training, and so is another function "
    "each time. Build the layer with track_running_stats=False, convert the model with "
    "torch.func.replace_all_batch_norm_modules_(model), or call model.eval() to take the stored statistics."
)
STATELESS: dict[str, Handler] = dict.fromkeys(("batch_norm", "instance_norm"), _batch_norm)
"""Where a model is to be a function."""

FORWARD_MODE: dict[str, Handler] = {
    **SECOND_DERIVATIVE,
    **dict.fromkeys(("__get__", "__set__"), _data),
    "mse_loss": _mse_loss,
    **dict.fromkeys(("cholesky", "cholesky_ex", "eigh", "eigvalsh", "matrix_sqrth"), _symmetric),
    "pinv": _pinv,
    "register_hook": refuse("forward mode does not go through a hook"),
    **dict.fromkeys(_NORMS, _norm),
    **dict.fromkeys(("scatter_reduce", "scatter_reduce_"), _scatter_reduce),
    **dict.fromkeys(
        ("as_strided_scatter", "cholesky_inverse", "max_unpool1d", "max_unpool2d", "max_unpool3d", "triangular_solve"),
        _WRONG_FORMULA,
    ),
}
"""Where a tangent passes."""

_NOT_DIFFERENTIABLE = refuse("torch's forward-mode formula for it cannot be differentiated, and gives wrong numbers")

NESTED: dict[str, Handler] = {
    **FORWARD_MODE,
    **dict.fromkeys(
        (
            "_batch_norm_with_update",
            "_native_batch_norm_legit",
            "_linalg_det",
            "_linalg_slogdet",
            "_linalg_solve_ex",
            "_safe_softmax",
            "batch_norm",
            "cumprod",
            "cumprod_",
            "det",
            "eigh",
            "householder_product",
            "instance_norm",
            "layer_norm",
            "logcumsumexp",
            "logdet",
            "native_batch_norm",
            "native_layer_norm",
            "orgqr",
            "slogdet",
            "solve",
            "solve_ex",
            "tensorsolve",
        ),
        _NOT_DIFFERENTIABLE,
    ),
}
"""Where a forward-mode formula is differentiated itself."""

THIRD_ORDER: dict[str, Handler] = dict.fromkeys(
    ("layer_norm", "native_layer_norm"),
    refuse("torch's third derivative of it is wrong; write it by mean and variance"),
)
"""Where a third derivative is taken in reverse mode."""

NESTED_TWICE: dict[str, Handler] = {**NESTED, **dict.fromkeys(("eig", "eigvals", "prod"), _NOT_DIFFERENTIABLE)}
"""Where a forward-mode formula is differentiated twice."""
