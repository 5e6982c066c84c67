"""The top of a Hessian's spectrum, by Lanczos on products with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from metalearn.derivatives.hvp import hvp
from metalearn.derivatives.inputs import Point, ScalarFunction, as_input


def top_eigenvalues(
    f: ScalarFunction,
    x: Point,
    k: int = 1,
    *,
    tol: float = 1e-3,
    seed: int = 0,
    mode: str = "forward_over_reverse",
) -> Tensor:
    """The k largest eigenvalues of the Hessian, by Lanczos through ``hvp``: the matrix is never formed.

    Args:
        f: from a point to a scalar.
        x: where, n numbers in all.
        k: how many, at most n.
        tol: relative accuracy.
        seed: of the vector that Lanczos starts from.
        mode: of the products, as in ``hvp``.

    Returns:
        ``[k]``, largest first, float64, on the CPU.

    Raises:
        ValueError: for a k below 1 or above n, and as ``hvp``.
        ArithmeticError: if Lanczos does not reach ``tol``, or meets NaN.

    Reference: Lehoucq, Sorensen & Yang 1998, "ARPACK users' guide", through ``scipy.sparse.linalg.eigsh``.
    """
    x = as_input("x", x)
    leaves, spec = tree_flatten(x)
    sizes = [leaf.numel() for leaf in leaves]
    n = sum(sizes)
    if not 1 <= k <= n:
        raise ValueError(f"top_eigenvalues: k={k}; it must be at least 1 and at most n = {n}.")

    def product(column: Any) -> Any:
        entries = torch.as_tensor(column).reshape(-1).split(sizes)
        v = tree_unflatten([e.reshape(leaf.shape).to(leaf) for e, leaf in zip(entries, leaves, strict=True)], spec)
        parts = [p.detach().double().cpu().reshape(-1) for p in tree_flatten(hvp(f, x, v, mode=mode))[0]]
        if not all(torch.isfinite(p).all() for p in parts):
            raise ArithmeticError("top_eigenvalues: a product with the Hessian is not finite; look for NaN in f.")
        return torch.cat(parts).numpy()

    if k >= n - 1 or n <= _SMALL:  # Lanczos needs room; a small matrix is quicker formed
        columns = [torch.from_numpy(product(row.numpy())) for row in torch.eye(n, dtype=torch.float64)]
        ascending: Tensor = torch.linalg.eigvalsh(torch.stack(columns))
        return ascending.flip(0)[:k]
    start = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).numpy()
    if not product(start).any():
        return torch.zeros(k, dtype=torch.float64)  # f is linear here; Lanczos cannot start from nothing
    from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh  # the mathematics imports torch alone

    operator = LinearOperator((n, n), matvec=product, dtype=start.dtype)
    try:
        values = eigsh(operator, k=k, which="LA", tol=tol, v0=start, return_eigenvectors=False)
    except ArpackError as error:
        raise ArithmeticError(f"top_eigenvalues: {error}. Raise tol (now {tol}).") from error
    return torch.from_numpy(values).sort(descending=True).values


_SMALL = 32  # numbers
