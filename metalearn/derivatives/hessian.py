"""Compute the dense Hessian, if its n x n numbers fit into memory."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map

from metalearn.core.operations import unsupported
from metalearn.core.params import check_finite, is_finite
from metalearn.derivatives.inputs import Input, ScalarFunction, as_input, as_scalar_function

_CHUNK_SIZE = 64  # rows


def hessian(f: ScalarFunction, x: Input, *, memory_limit: int | None = None) -> Any:
    """Return the dense Hessian by ``torch.func.jacrev`` of the gradient, after checking that it fits.

    It may take ``memory_limit`` bytes, by default the free memory of the device.

    Returns:
        For a Tensor of shape ``s``: ``[*s, *s]``. For a dictionary: a dictionary of dictionaries, ``[a][b]`` of shape
        ``[*x[a].shape, *x[b].shape]``.

    Raises:
        MemoryError: if the estimate (``hessian_bytes``) is above the limit.
        NonFiniteGradientError: if an entry is NaN or infinite, though ``f`` is finite.
        ValueError, TypeError: where ``hvp`` raises them.

    Examples:
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
            f"hessian: n = {n:,} numbers make a matrix of {n * n:,} entries, which takes about "
            f"{_format_bytes(estimate)} while it is computed, and {_format_bytes(limit)} may be used. Use hvp(f, x, v) "
            "for products with it, or top_eigenvalues(f, x, k) for its spectrum: both take the memory of a few vectors."
        )
    # In chunks of rows, as torch.func.hessian's single batch of n rows takes the activations n times.
    value = as_scalar_function(
        f, {"masked_select": unsupported("its Hessian is wrong under torch.vmap; index by x[mask]")}
    )
    rows = torch.func.jacrev(torch.func.grad(value), chunk_size=_CHUNK_SIZE)(tree_map(torch.detach, x))
    matrix = tree_map(torch.detach, rows)
    if not (torch._C._are_functorch_transforms_active() or is_finite(matrix)) and torch.isfinite(
        as_scalar_function(f)(x)
    ):
        check_finite("the Hessian", matrix)
    return matrix


def hessian_bytes(x: Input) -> int:
    """Estimate the peak memory of ``hessian`` in bytes: twice the n x n entries, as its rows are concatenated.

    The activations of 64 backward passes through the gradient are not included.
    """
    leaves = tree_flatten(x)[0]
    n: int = sum(leaf.numel() for leaf in leaves)
    sizes: list[int] = [leaf.element_size() for leaf in leaves]
    return 2 * n * n * max(sizes)


def available_memory(device: torch.device) -> int:
    """Return the bytes that are free now: on the GPU, or in main memory without swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil  # the mathematics imports torch alone

    return psutil.virtual_memory().available


def _format_bytes(size: int) -> str:
    exponent = min(int(math.log(max(size, 1), 1024)), 4)
    return f"{size / 1024**exponent:.3g} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[exponent]}"
