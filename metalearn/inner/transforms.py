"""Learned transforms of the inner gradients: a preconditioner whose tensors are meta-parameters.

    theta_{k+1} = theta_k - alpha * d_k,    d_k = rule(P(g_0), ..., P(g_k))

Any object with the two methods of ``GradientTransform`` is a transform. Every engine differentiates through it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from metalearn.core.types import Params


class GradientTransform(Protocol):
    """Maps gradients to gradients, for T tasks at once. Make it a frozen dataclass: it keeps nothing between steps."""

    def init(self, params: Params) -> Params:
        """Return the learned tensors to begin with, under names of its own, from the adapted parameters ``[...]``.

        They are on the device of the parameters, which may be ``meta``, where names and shapes alone count.
        """

    def apply(self, k: int, grads: Params, learned: Params) -> Params:
        """Return the gradients of step k, counted from 0, transformed by differentiable operations.

        The gradients, the learned tensors and the result are ``[T, ...]``.
        """


@dataclass(frozen=True)
class MetaCurvature:
    """Multiply each gradient by a learned matrix along each of its modes, all of them identities at first.

        P(G)_{o i f} = sum over o', i', f' of M_out[o, o'] M_in[i, i'] M_spatial[f, f'] G_{o' i' f'}

    Of the modes of a convolution's weight, ``[out, in, h, w]``, the h * w positions f are one; a linear layer's weight
    has two, and a vector or scalar is multiplied entry by entry. The matrices of a parameter ``NAME`` are learned as
    ``NAME/out``, ``NAME/in`` and ``NAME/spatial``, or ``NAME/scale``.

    Park & Oliva 2019, arXiv 1902.03356, section 3.2.
    """

    def init(self, params: Params) -> Params:
        """Return identity matrices, and ones for vectors."""
        learned = {}
        for name, p in params.items():
            if p.ndim < 2:
                learned[f"{name}/scale"] = torch.ones_like(p)
            for mode, size in zip(_MODES, _matrix_shape(p), strict=False):
                learned[f"{name}/{mode}"] = torch.eye(size, dtype=p.dtype, device=p.device)
        return learned

    def apply(self, k: int, grads: Params, learned: Params) -> Params:
        """Return the products."""
        return {name: _multiply_modes(g, name, learned) for name, g in grads.items()}


_MODES = ("out", "in", "spatial")


def _matrix_shape(p: Tensor) -> tuple[int, ...]:
    """Return (out, in) of a matrix, (out, in, all positions) of a convolution's weight, and nothing of a vector."""
    return (*p.shape[:2], *([p.shape[2:].numel()] if p.ndim > 2 else [])) if p.ndim > 1 else ()


def _multiply_modes(g: Tensor, name: str, learned: Params) -> Tensor:
    """Multiply one gradient ``[T, ...]``."""
    if g.ndim < 3:
        return g * learned[f"{name}/scale"]
    out = learned[f"{name}/out"] @ g.flatten(2)  # [T, out, in * positions]
    by_position = learned[f"{name}/in"].unsqueeze(1) @ out.unflatten(2, (g.shape[2], -1))  # [T, out, in, positions]
    if g.ndim > 3:
        by_position = by_position @ learned[f"{name}/spatial"].mT.unsqueeze(1)
    return by_position.reshape(g.shape)
