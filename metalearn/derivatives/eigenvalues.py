"""Compute the largest eigenvalues of a Hessian by Lanczos on Hessian-vector products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from metalearn.derivatives.hvp import hvp
from metalearn.derivatives.inputs import Input, ScalarFunction, as_input

_DENSE_BELOW = 32  # numbers


def top_eigenvalues(
    f: ScalarFunction,
    x: Input,
    k: int = 1,
    *,
    tol: float = 1e-3,
    seed: int = 0,
    mode: str = "forward_over_reverse",
) -> Tensor:
    """Return the k largest eigenvalues of the Hessian by Lanczos through ``hvp``, without forming the matrix.

    ``tol`` is their relative accuracy, ``seed`` that of the initial vector, ``mode`` that of the products.

    Returns:
        ``[k]``, largest first, float64, on the CPU.

    Raises:
        ValueError: for a k below 1 or above n, and where ``hvp`` raises it.
        ArithmeticError: if Lanczos does not reach ``tol``, or a product is NaN.

    Reference: Lehoucq, Sorensen & Yang 1998, "ARPACK users' guide", through ``scipy.sparse.linalg.eigsh``.
    """
    x = as_input("x", x)
    n = sum(leaf.numel() for leaf in tree_flatten(x)[0])
    if not 1 <= k <= n:
        raise ValueError(f"top_eigenvalues: k={k}; it must be at least 1 and at most n = {n}.")
    product = _numpy_hvp(f, x, mode)
    if k >= n - 1 or n <= _DENSE_BELOW:  # Lanczos needs k < n - 1; a small matrix is faster
        columns = [torch.from_numpy(product(row.numpy())) for row in torch.eye(n, dtype=torch.float64)]
        ascending: Tensor = torch.linalg.eigvalsh(torch.stack(columns))
        return ascending.flip(0)[:k]
    start = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).numpy()
    if not product(start).any():
        return torch.zeros(k, dtype=torch.float64)  # f is linear here; Lanczos cannot start from zeros
    from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh  # the mathematics imports torch alone

    operator = LinearOperator((n, n), matvec=product, dtype=start.dtype)
    try:
        values = eigsh(operator, k=k, which="LA", tol=tol, v0=start, return_eigenvectors=False)
    except ArpackError as error:
        raise ArithmeticError(f"top_eigenvalues: {error}. Raise tol (now {tol}).") from error
    return torch.from_numpy(values).sort(descending=True).values


def _numpy_hvp(f: ScalarFunction, x: Any, mode: str) -> Callable[[Any], Any]:
    """Return H v as a function of a flat NumPy vector v."""
    leaves, spec = tree_flatten(x)

    def product(column: Any) -> Any:
        entries = torch.as_tensor(column).reshape(-1).split([leaf.numel() for leaf in leaves])
        v = tree_unflatten([e.reshape(leaf.shape).to(leaf) for e, leaf in zip(entries, leaves, strict=True)], spec)
        parts = [p.detach().double().cpu().reshape(-1) for p in tree_flatten(hvp(f, x, v, mode=mode))[0]]
        if not all(torch.isfinite(p).all() for p in parts):
            raise ArithmeticError("top_eigenvalues: a product with the Hessian is not finite; look for NaN in f.")
        return torch.cat(parts).numpy()

    return product
