"""Replace operations whose derivatives torch gets wrong, or raise an error that names them.

``CorrectedOperations`` is active around every model, loss and function that is differentiated here. It sees each call
by name and replaces those in its tables:

    corrected      everywhere: the same values, with correct derivatives
    FORWARD_MODE   where a tangent passes: Hessian-vector products by forward over reverse, and the engine ``adjoint``
    NESTED         where the forward-mode formula itself is differentiated: reverse over forward, forward over forward

``tests/core/operations`` found each of them: it takes torch's own database of operations through every mode and engine.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_batchedtensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from metalearn.core.recurrent import RECURRENT

Handler = Callable[..., Any]
"""``handler(func, *args, **kwargs)``: called in place of ``func(*args, **kwargs)``."""


class CorrectedOperations(TorchFunctionMode):
    """A context in which operations of the tables are replaced.

    Args:
        tables: handlers by name of the operation, in addition to the corrections everywhere; the last one wins.
        kernels: functions to try first, by the operation they replace; ``NotImplemented`` declines.
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
    """Return one name for an operation as a function, a method, or a member of ``torch.linalg`` or ``special``."""
    if func not in _NAMES:
        name: str = getattr(func, "__name__", "")
        _NAMES[func] = name.partition(".")[0].removeprefix("linalg_").removeprefix("special_")
    return _NAMES[func]


_NAMES: dict[Any, str] = {}


def unsupported(reason: str) -> Handler:
    """Return a handler that raises ``NotImplementedError`` with the operation's name and the reason."""

    def handler(func: Any, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{operation_name(func)}: {reason}")

    return handler


def _unsupported_under_vmap(reason: str) -> Handler:
    """Return a handler that raises like ``unsupported`` if a tensor is batched."""
    raise_unsupported = unsupported(reason)

    def handler(func: Any, *args: Any, **kwargs: Any) -> Any:
        batched = any(isinstance(a, Tensor) and is_batchedtensor(a) for a in (*args, *kwargs.values()))
        return (raise_unsupported if batched else _passthrough)(func, *args, **kwargs)

    return handler


def _graph_property(func: Any, tensor: Tensor) -> Any:
    """Read a property of the graph, which ``vmap`` gets wrong: ``requires_grad`` is false, and ``grad_fn`` dropped."""
    if not is_batchedtensor(tensor):
        return func(tensor)
    if func in _GRAPH_PROPERTIES:
        raise NotImplementedError("grad_fn and is_leaf of a tensor that torch.vmap has batched")
    if func == _REQUIRES_GRAD:
        while is_batchedtensor(tensor):
            tensor = get_unwrapped(tensor)
    return func(tensor)


_REQUIRES_GRAD: Any = Tensor.requires_grad.__get__  # type: ignore[attr-defined]
_GRAPH_PROPERTIES = tuple(vars(torch._C.TensorBase)[name].__get__ for name in ("grad_fn", "is_leaf"))
_DATA_ACCESSORS: Any = (Tensor.data.__get__, Tensor.data.__set__)  # type: ignore[attr-defined]


def _weight_norm(func: Any, v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Compute by the formula: the second derivative of torch's fused kernel is off by 8 to 48%."""
    others = [d for d in range(v.ndim) if d != dim]  # dim=-1 is torch's for the norm of all entries
    norm = torch.linalg.vector_norm(v) if dim == -1 else torch.linalg.vector_norm(v, dim=others, keepdim=True)
    return v * (g / norm)


def _linear_cross_entropy(func: Any, *args: Any, options: Any = None, **kwargs: Any) -> Any:
    """Compute unchunked: chunks (``options``) lose the second derivative, and under ``vmap`` the first."""
    return func(*args, **kwargs)


def _sinc(func: Any, x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Compute by the series near 0, where torch's second derivative is 0/0."""
    if out is not None:
        return func(x, out=out)  # autograd raises on it
    z = torch.pi * x
    small = z.abs() < 1e-2
    square = torch.where(small, z * z, 0.0)
    series = 1 - square / 6 * (1 - square / 20 * (1 - square / 42 * (1 - square / 72)))
    away = torch.where(small, 1.0, z)
    return torch.where(small, series, torch.sin(away) / away)


def _embedding(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Stop the gradient of the padding row in every task, and make no gradient sparse (no second derivative).

    torch's batching rule does so in the first task only, and its forward mode not at all.
    """
    is_functional = func is functional.embedding
    bound = (_FUNCTIONAL_EMBEDDING if is_functional else _TORCH_EMBEDDING).bind(*args, **kwargs).arguments
    words, weight, padding = bound["input" if is_functional else "indices"], bound["weight"], bound.get("padding_idx")
    if not is_functional and padding is not None and padding < 0:
        padding = None  # torch.embedding's -1 is no row
    if bound.get("max_norm") is not None:
        raise ValueError(
            f"embedding: max_norm={bound['max_norm']} rescales the weights in place at every call, which no gradient "
            "goes through and all tasks would share. Build nn.Embedding without max_norm, and normalise the rows in "
            "the model: torch.renorm(weight, 2, 0, max_norm)."
        )
    vectors = functional.embedding(words, weight, scale_grad_by_freq=bound.get("scale_grad_by_freq", False))
    if padding is None:
        return vectors
    if not -weight.shape[0] <= padding < weight.shape[0]:
        return func(*args, **kwargs)  # torch raises its error
    return torch.where((words == padding % weight.shape[0]).unsqueeze(-1), vectors.detach(), vectors)


_FUNCTIONAL_EMBEDDING = inspect.signature(functional.embedding)
_TORCH_EMBEDDING = inspect.signature(
    lambda weight, indices, padding_idx=-1, scale_grad_by_freq=False, sparse=False: None
)


def _hardsigmoid(func: Any, x: Tensor, inplace: bool = False) -> Tensor:
    """Compute by the formula with the kernel's slope, 1/6 in float32: the kernel has no second derivative."""
    if inplace:
        return func(x, inplace)
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
        _unsupported_under_vmap("its derivative is wrong under torch.vmap"),
    ),
    "register_hook": _unsupported_under_vmap("torch.vmap never calls a hook"),
    "__get__": _graph_property,
    **RECURRENT,
}


def _mse_loss(func: Any, input: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: A002
    """Take the mean outside: torch's formula for it writes to the zeros of a missing tangent (pytorch #112013)."""
    options = {name: value for name, value in kwargs.items() if value is not None}
    if func is not functional.mse_loss or args or options not in ({}, {"reduction": "mean"}):
        return func(input, target, *args, **kwargs)
    return func(input, target, reduction="none").mean()


def _symmetrise(func: Any, a: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Symmetrise a tangent, as reverse mode does with a gradient; torch reads one triangle of it."""
    symmetric = (a + a.mH) / 2
    return func(a.detach() + (symmetric - symmetric.detach()), *args, **kwargs)


def _pinv(func: Any, *args: Any, **kwargs: Any) -> Any:
    hermitian = kwargs.get("hermitian", False) or any(arg is True for arg in args)
    return (_HERMITIAN_UNSUPPORTED if hermitian else _passthrough)(func, *args, **kwargs)


def _passthrough(func: Any, *args: Any, **kwargs: Any) -> Any:
    return func(*args, **kwargs)


def _norm(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Make the derivative of a norm of 0 NaN, as double backward does: torch's forward formula gives 0."""
    norm = func(*args, **kwargs)
    position = 2 if operation_name(func) in ("dist", "pairwise_distance") else 1
    order = kwargs.get("p", kwargs.get("ord", args[position] if len(args) > position else None))
    if order in (0, 1, float("inf"), -float("inf")):
        return norm  # these have a kink, and no curvature
    return torch.where(norm == 0, (norm * norm).sqrt(), norm)


def _std(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Take the root of the variance: torch's own formula gives 0 for every derivative where the variance is 0."""
    return torch.var(*args, **kwargs).sqrt()


def _std_mean(func: Any, *args: Any, **kwargs: Any) -> Any:
    variance, mean = torch.var_mean(*args, **kwargs)
    return variance.sqrt(), mean


SECOND_DERIVATIVE: dict[str, Handler] = {"std": _std, "std_mean": _std_mean}
"""Used where only a second derivative is taken."""


def _data(func: Any, *args: Any) -> Any:
    """Raise on ``.data``, which keeps a tangent."""
    if func in _DATA_ACCESSORS:
        raise NotImplementedError("forward mode does not stop at .data; use .detach() on what is constant")
    return _graph_property(func, *args) if len(args) == 1 else func(*args)


def _scatter_reduce(func: Any, *args: Any, **kwargs: Any) -> Any:
    products = any(isinstance(arg, str) and arg == "prod" for arg in (*args, *kwargs.values()))
    return (_UNSUPPORTED if products else _passthrough)(func, *args, **kwargs)


_HERMITIAN_UNSUPPORTED = unsupported("with hermitian=True it reads one triangle, and torch's forward mode both")
_UNSUPPORTED = unsupported("torch's forward-mode formula for it is wrong")

_NORMS = (
    *("norm", "vector_norm", "matrix_norm", "frobenius_norm", "norm_except_dim"),
    *("dist", "pairwise_distance"),
)


def _batch_norm(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Raise on running statistics that are written, as the model would be another function at every call."""
    names = _TORCH_ARGUMENTS if func is torch.batch_norm else _FUNCTIONAL_ARGUMENTS
    bound = {**dict(zip(names, args, strict=False)), **kwargs}
    if bound.get("running_mean") is not None and (bound.get("training") or bound.get("use_input_stats")):
        raise ValueError(RUNNING_STATISTICS_ERROR)
    return func(*args, **kwargs)


_TORCH_ARGUMENTS = ("input", "weight", "bias", "running_mean", "running_var", "training")
_FUNCTIONAL_ARGUMENTS = ("input", "running_mean", "running_var", "weight", "bias", "training")
RUNNING_STATISTICS_ERROR = (
    "the model writes to running statistics at every call, as BatchNorm does in training, and so is another function "
    "each time. Say which to take: functionalize(model, batch_norm='task' or 'frozen'); or build the layer with "
    "track_running_stats=False, or call model.eval() to take the stored statistics."
)
STATELESS: dict[str, Handler] = dict.fromkeys(("batch_norm", "instance_norm"), _batch_norm)
"""Used where a model must be a pure function."""

FORWARD_MODE: dict[str, Handler] = {
    **SECOND_DERIVATIVE,
    **dict.fromkeys(("__get__", "__set__"), _data),
    "mse_loss": _mse_loss,
    **dict.fromkeys(("cholesky", "cholesky_ex", "eigh", "eigvalsh", "matrix_sqrth"), _symmetrise),
    "pinv": _pinv,
    "register_hook": unsupported("forward mode does not go through a hook"),
    **dict.fromkeys(_NORMS, _norm),
    **dict.fromkeys(("scatter_reduce", "scatter_reduce_"), _scatter_reduce),
    **dict.fromkeys(
        ("as_strided_scatter", "cholesky_inverse", "max_unpool1d", "max_unpool2d", "max_unpool3d", "triangular_solve"),
        _UNSUPPORTED,
    ),
}
"""Used where a tangent passes."""

_NOT_DIFFERENTIABLE = unsupported(
    "torch's forward-mode formula for it cannot be differentiated, and gives wrong numbers"
)

_NOT_TWICE_IN_FORWARD_MODE = (
    *("batch_norm", "_batch_norm_with_update", "_native_batch_norm_legit", "native_batch_norm", "instance_norm"),
    *("layer_norm", "native_layer_norm", "cumprod", "cumprod_", "logcumsumexp", "_safe_softmax"),
    *("det", "_linalg_det", "logdet", "slogdet", "_linalg_slogdet", "solve", "solve_ex", "_linalg_solve_ex"),
    *("tensorsolve", "eigh", "householder_product", "orgqr"),
)

NESTED: dict[str, Handler] = {**FORWARD_MODE, **dict.fromkeys(_NOT_TWICE_IN_FORWARD_MODE, _NOT_DIFFERENTIABLE)}
"""Used where a forward-mode formula is differentiated."""

THIRD_ORDER: dict[str, Handler] = dict.fromkeys(
    ("layer_norm", "native_layer_norm"),
    unsupported("torch's third derivative of it is wrong; write it by mean and variance"),
)
"""Used where a third derivative is taken in reverse mode."""

NESTED_TWICE: dict[str, Handler] = {**NESTED, **dict.fromkeys(("eig", "eigvals", "prod"), _NOT_DIFFERENTIABLE)}
"""Used where a forward-mode formula is differentiated twice."""
