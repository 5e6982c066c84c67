"""The dense Hessian, for as long as n x n numbers fit."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from metalearn.core.operations import CorrectedOperations, refuse
from metalearn.derivatives.inputs import Point, ScalarFunction, as_input, as_scalar_function
from metalearn.derivatives.singular import check_finite, is_finite


def hessian(f: ScalarFunction, x: Point, *, memory_limit: int | None = None) -> Any:
    """The dense Hessian, by ``torch.func.jacrev`` of the gradient, after checking that it fits.

    Args:
        f: from a point to a scalar.
        x: where, n numbers in all.
        memory_limit: bytes that it may take; ``None`` is what is free on the device now.

    Returns:
        For a Tensor of shape ``s``: ``[*s, *s]``. For a dictionary: a dictionary of dictionaries, ``[a][b]`` of shape
        ``[*x[a].shape, *x[b].shape]``.

    Raises:
        MemoryError: if the estimate (``hessian_bytes``) is above the limit.
        NonFiniteGradientError: if an entry is NaN or infinite, though ``f`` is finite.
        ValueError, TypeError: as ``hvp``.

    Example:
        >>> hessian(lambda x: x[0] ** 2 * x[1], torch.tensor([1.0, 2.0]))
        tensor([[4., 2.],
                [2., 0.]])
    """
    x = as_input("x", x)
    leaves = tree_flatten(x)[0]
    estimate = hessian_bytes(x)
    limit = available_memory(leaves[0].device) if memory_limit is None else memory_limit
    if estimate > limit:
        n = sum(leaf.numel() for leaf in leaves)
        raise MemoryError(
            f"hessian: n = {n:,} numbers make a matrix of {n * n:,} entries, which takes about {_in_words(estimate)} "
            f"while it is computed, and {_in_words(limit)} may be used. Use hvp(f, x, v) for products with it, or "
            "top_eigenvalues(f, x, k) for its spectrum: both take the memory of a few vectors."
        )
    # In chunks of rows, as torch.func.hessian's single batch of n rows takes the activations n times.
    rows = torch.func.jacrev(torch.func.grad(_of_rows(f)), chunk_size=_ROWS_AT_A_TIME)(tree_map(torch.detach, x))
    matrix = tree_map(torch.detach, rows)
    if not (torch._C._are_functorch_transforms_active() or is_finite(matrix)) and torch.isfinite(
        as_scalar_function(f)(x)
    ):
        check_finite("the Hessian", matrix)
    return matrix


def _of_rows(f: ScalarFunction) -> ScalarFunction:
    """``f``, refused where ``torch.vmap`` over the rows takes a derivative wrongly."""

    def watched(x: Any) -> Tensor:
        with CorrectedOperations({"masked_select": refuse("its Hessian is wrong under torch.vmap; index by x[mask]")}):
            return as_scalar_function(f)(x)

    return watched


_ROWS_AT_A_TIME = 64


def hessian_bytes(x: Point) -> int:
    """Estimated peak of ``hessian`` in bytes: the n x n entries, and once more while they are put together.

    The activations of 64 backward passes through the gradient come on top.
    """
    leaves = tree_flatten(x)[0]
    n: int = sum(leaf.numel() for leaf in leaves)
    sizes: list[int] = [leaf.element_size() for leaf in leaves]
    return 2 * n * n * max(sizes)


def available_memory(device: torch.device) -> int:
    """Memory that is free now: the GPU's, or what the system can give without swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil  # the mathematics imports torch alone

    available: int = psutil.virtual_memory().available
    return available


def _in_words(size: int) -> str:
    exponent = min(int(math.log(max(size, 1), 1024)), 4)
    return f"{size / 1024**exponent:.3g} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[exponent]}"
