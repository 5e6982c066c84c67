"""BatchNorm of T stacked tasks, each normalised by its own batch; both derivatives take a few passes.

Per channel, over the M numbers of its B images, with x' = (x - mean) r and r = 1 / sqrt(var + eps):

    z  = gamma x' + beta
    dL/dx = gamma r (g - <g> - x' <g x'>),    dL/dgamma = M <g x'>,    dL/dbeta = M <g>,    g = dL/dz, <.> the mean

(Ioffe & Szegedy 2015, arXiv 1502.03167, section 3.) Autograd's derivative of these takes many passes over the images.
Worked out by hand, each is a sum of given images times factors per channel, which need only means of products.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from metalearn.models.kernels.layout import (
    Kernel,
    merge_tasks_into_channels,
    per_channel_view,
    split_tasks_from_channels,
    uses_torch_kernels,
)

_NO_RUNNING = (None, None)
_REDUCED_DIMS = (0, 2, 3)


def batch_norm(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """Normalise the images ``[T, B, C, H, W]`` of T tasks, each by the statistics of its own B images.

    ``gamma`` and ``beta`` are ``[T, C]``.
    """
    return _batch_norm(x, gamma, beta, eps)[0]


class _BatchNorm(Kernel):
    @staticmethod
    def forward(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Any:
        images, dtype = merge_tasks_into_channels(x), x.dtype
        if uses_torch_kernels(x):
            z, mean, r = torch.native_batch_norm(images, gamma.flatten(), beta.flatten(), *_NO_RUNNING, True, 0.0, eps)
            return split_tasks_from_channels(z, x.shape[0]).data, mean.view_as(gamma), r.view_as(gamma)
        mean, variance = _mean_and_variance(images)
        r = (variance + eps).rsqrt()
        s = gamma.flatten() * r  # in double precision until it is applied to the images
        z = _combine((beta.flatten() - mean * s).to(dtype), (images, s.to(dtype)))
        mean, r = (t.to(dtype).view_as(gamma) for t in (mean, r))
        return split_tasks_from_channels(z, x.shape[0]).data, mean, r  # no view: layers may write to it

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, gamma, _, ctx.eps = inputs
        _, mean, r = output
        ctx.mark_non_differentiable(mean, r)
        ctx.save_for_backward(x, gamma, mean, r)
        ctx.save_for_forward(x, gamma)

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Any) -> Any:
        x, gamma, mean, r = ctx.saved_tensors
        return *_batch_norm_backward(g, x, gamma, mean, r, ctx.eps), None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dgamma: Tensor | None, dbeta: Tensor | None, _: None) -> Any:
        x, gamma = ctx.saved_tensors
        dx, dgamma, dbeta = _zeros_for(((dx, x), (dgamma, gamma), (dbeta, gamma)))
        at = _NormalizedBatch.of(x, gamma, ctx.eps)
        d, dg, db = merge_tasks_into_channels(dx), dgamma.flatten(), dbeta.flatten()
        mean_d = _mean(d)
        along = at.r * (_mean(d * at.x) - mean_d * at.mean)  # <x' dx>
        s = at.gamma * at.r
        by_x = at.r * (dg - s * along)  # of (x - mean)
        out = _combine(db - s * mean_d - by_x * at.mean, (d, s), (at.x, by_x))
        return split_tasks_from_channels(out, x.shape[0]), None, None


class _BatchNormBackward(Kernel):
    """The gradient (dL/dx, dL/dgamma, dL/dbeta) as a function of (g, x, gamma), with known mean and r."""

    @staticmethod
    def forward(g: Tensor, x: Tensor, gamma: Tensor, mean: Tensor, r: Tensor, eps: float) -> Any:
        at, gm = (
            _NormalizedBatch(merge_tasks_into_channels(x), gamma.flatten(), mean.flatten(), r.flatten()),
            merge_tasks_into_channels(g),
        )
        if uses_torch_kernels(x):
            stated = (gm, at.x, at.gamma, *_NO_RUNNING, at.mean, at.r, True, eps, (True, True, True))
            to_x, to_gamma, to_beta = torch.ops.aten.native_batch_norm_backward(*stated)
            return split_tasks_from_channels(to_x, x.shape[0]), to_gamma.view_as(gamma), to_beta.view_as(gamma)
        to_gamma, to_beta = _sums(gm, at.x, at.mean, at.r)
        number = at.x.numel() / at.x.shape[1]
        s = at.gamma * at.r
        by_x = -s * at.r * to_gamma / number  # of (x - mean)
        to_x = _combine(-s * to_beta / number - by_x * at.mean, (gm, s), (at.x, by_x))
        return split_tasks_from_channels(to_x, x.shape[0]), to_gamma.view_as(gamma), to_beta.view_as(gamma)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        g, x, gamma, mean, r, ctx.eps = inputs
        _, to_gamma, to_beta = output
        ctx.save_for_backward(g, x, gamma, mean, r, to_gamma, to_beta)
        ctx.save_for_forward(g, x, gamma)

    @staticmethod
    def backward(ctx: Any, v: Tensor, u_gamma: Tensor, u_beta: Tensor) -> Any:
        g, x, gamma, mean, r, to_gamma, to_beta = ctx.saved_tensors
        gm, vm = merge_tasks_into_channels(g), merge_tasks_into_channels(v)
        if _needs_grad(g, x, gamma, v):  # for a third derivative mean and r must depend on x
            at = _NormalizedBatch.of(x, gamma, ctx.eps)
            centred = at.centred()
            means = _ChannelMeans(_mean(gm), _mean(gm * centred), _mean(vm), _mean(vm * centred), _mean(vm * gm))
        else:
            at = _NormalizedBatch(merge_tasks_into_channels(x), gamma.flatten(), mean.flatten(), r.flatten())
            number = at.x.numel() / at.x.shape[1]
            v_x, v_sum = _sums(vm, at.x, at.mean, at.r)
            v_g, _ = _sums(vm, gm, torch.zeros_like(at.r), torch.ones_like(at.r))
            means = _ChannelMeans(*(m.flatten() / number for m in (to_beta, to_gamma, v_sum, v_x, v_g)))
        parts = _batch_norm_double_backward(at, gm, vm, u_gamma.flatten(), u_beta.flatten(), means)
        tasks = x.shape[0]
        return (
            split_tasks_from_channels(parts[0], tasks),
            split_tasks_from_channels(parts[1], tasks),
            parts[2].view_as(gamma),
            None,
            None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, dg: Tensor | None, dx: Tensor | None, dgamma: Tensor | None, *_: Any) -> Any:
        g, x, gamma = ctx.saved_tensors
        dg, dx, dgamma = _zeros_for(((dg, g), (dx, x), (dgamma, gamma)))
        at = _NormalizedBatch.of(x, gamma, ctx.eps)
        to_x, b, a = _forward_over_reverse(
            at,
            merge_tasks_into_channels(g),
            merge_tasks_into_channels(dg),
            merge_tasks_into_channels(dx),
            dgamma.flatten(),
        )
        number = at.x.numel() / at.x.shape[1]
        return split_tasks_from_channels(to_x, x.shape[0]), (number * b).view_as(gamma), (number * a).view_as(gamma)


_batch_norm, _batch_norm_backward = _BatchNorm.apply, _BatchNormBackward.apply


class _NormalizedBatch(NamedTuple):
    """A batch ``[B, T * C, H, W]``, and its parameters and statistics per channel, ``[T * C]``."""

    x: Tensor
    gamma: Tensor
    mean: Tensor
    r: Tensor

    @classmethod
    def of(cls, x: Tensor, gamma: Tensor, eps: float) -> _NormalizedBatch:
        """Compute mean and r as differentiable functions of x."""
        images = merge_tasks_into_channels(x)
        mean = _mean(images)
        variance = _mean((images - per_channel_view(mean)).square())
        return cls(images, gamma.flatten(), mean, (variance + eps).rsqrt())

    def centred(self) -> Tensor:
        """Return x'."""
        return (self.x - per_channel_view(self.mean)) * per_channel_view(self.r)


class _ChannelMeans(NamedTuple):
    """The means <g>, <g x'>, <v>, <v x'> and <v g>, each ``[T * C]``."""

    g: Tensor
    gx: Tensor
    v: Tensor
    vx: Tensor
    vg: Tensor


def _batch_norm_double_backward(
    at: _NormalizedBatch, g: Tensor, v: Tensor, u_gamma: Tensor, u_beta: Tensor, m: _ChannelMeans
) -> tuple[Tensor, Tensor, Tensor]:
    """Return d/d(g, x, gamma) of <<v, dL/dx>> + u_gamma dL/dgamma + u_beta dL/dbeta, <<.>> the sum.

    With s = gamma r and P h = h - <h> - x' <h x'>, dL/dx = s P g and dx' = r P dx, dr = -r^2 <x' dx>. So x' has the
    adjoint q = u_gamma g - s (v <g x'> + g <v x'>), and x has  r P q - x' r s <v P g>.
    """
    s = at.gamma * at.r
    v_p_g = m.vg - m.v * m.g - m.vx * m.gx
    q_v, q_g = -s * m.gx, u_gamma - s * m.vx  # q = q_v v + q_g g
    q = q_v * m.v + q_g * m.g
    qx = q_v * m.vx + q_g * m.gx
    by_x = -at.r.square() * (qx + s * v_p_g)  # of (x - mean)
    to_x = _combine(-at.r * q - by_x * at.mean, (v, at.r * q_v), (g, at.r * q_g), (at.x, by_x))
    back = at.r * (u_gamma - s * m.vx)
    to_g = _combine(u_beta - s * m.v - back * at.mean, (v, s), (at.x, back))
    number = at.x.numel() / at.x.shape[1]
    return to_g, to_x, number * at.r * v_p_g


def _forward_over_reverse(
    at: _NormalizedBatch, g: Tensor, dg: Tensor, dx: Tensor, dgamma: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the derivative of (dL/dx, <g x'>, <g>) along (dg, dx, dgamma)."""
    centred = at.centred()
    a, b, da = _mean(g), _mean(g * centred), _mean(dg)
    mean_dx, along = _mean(dx), _mean(centred * dx)  # <dx>, <x' dx>
    db = _mean(dg * centred) + at.r * (_mean(g * dx) - mean_dx * a - along * b)
    s = at.gamma * at.r
    ds = dgamma * at.r - s * at.r * along
    by_x = at.r * (s * b * at.r * along - ds * b - s * db)
    constant = s * b * at.r * mean_dx - ds * a - s * da - by_x * at.mean
    return _combine(constant, (g, ds), (at.x, by_x), (dg, s), (dx, -s * b * at.r)), db, da


def _combine(constant: Tensor, *terms: tuple[Tensor, Tensor]) -> Tensor:
    """Return constant + sum of tensor * factor, with constant and factors per channel."""
    (first, factor), *others = terms
    out = torch.addcmul(per_channel_view(constant), first, per_channel_view(factor))
    for tensor, factor in others:
        out = out.addcmul_(tensor, per_channel_view(factor))
    return out


def _mean(images: Tensor) -> Tensor:
    return images.mean(dim=_REDUCED_DIMS)


def _mean_and_variance(images: Tensor) -> tuple[Tensor, Tensor]:
    """Compute mean and variance per channel in double precision, from those of parts of the rows.

    mean = <mean_p>,    var = <var_p> + <(mean_p - mean)^2>,    <.> over parts
    """
    parts = _num_parts(images)
    means, variances = torch.batch_norm_update_stats(_split_rows(images, parts), *_NO_RUNNING, 0.0)
    means, variances = means.view(parts, -1).double(), variances.view(parts, -1).double()
    mean = means.mean(dim=0)
    return mean, variances.mean(dim=0) + (means - mean).square().mean(dim=0)


def _sums(v: Tensor, x: Tensor, mean: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of v (x - mean) r and of v in one pass, as BatchNorm's derivative needs them."""
    parts = _num_parts(x)
    if parts > 1:
        mean, r = mean.repeat(parts), r.repeat(parts)
    _, products, sums = torch.ops.aten.native_batch_norm_backward(
        _split_rows(v, parts), _split_rows(x, parts), r, *_NO_RUNNING, mean, r, True, 0.0, (False, True, True)
    )
    return (products.view(parts, -1).sum(dim=0), sums.view(parts, -1).sum(dim=0)) if parts > 1 else (products, sums)


def _num_parts(images: Tensor) -> int:
    """Return the smallest number of equal parts with at most 2 sqrt(B H W) of a channel's B * H * W rows each.

    torch's sums over channels last add one row after the other in the images' precision, so that their error grows with
    the number of rows: in float32, the standard deviation of 4,000 rows has a relative error of 5e-6; with 35 parts it
    is 3e-8, as for contiguous images. An error of 5e-6 moves kinks of ReLU, and meta-gradients change by percents.
    On GPUs, whose sums are trees, it is 1.
    """
    if uses_torch_kernels(images):
        return 1
    rows = images.numel() // images.shape[1]
    fewest = math.isqrt(rows // 4) or 1
    return next(parts for parts in range(fewest, rows + 1) if rows % parts == 0)


def _split_rows(images: Tensor, parts: int) -> Tensor:
    """View ``[B, C, H, W]``, channels last, as ``[1, parts * C, B * H * W / parts, 1]``."""
    rows = images.permute(0, 2, 3, 1)
    return rows.view(1, -1, 1, parts * images.shape[1]).permute(0, 3, 1, 2)


def _needs_grad(*tensors: Tensor) -> bool:
    """Return whether a derivative of these tensors may be taken, in reverse or forward mode."""
    if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return True
    in_forward_mode = forward_ad._current_level >= 0
    return in_forward_mode and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def _zeros_for(pairs: tuple[tuple[Tensor | None, Tensor], ...]) -> list[Tensor]:
    return [torch.zeros_like(like) if tensor is None else tensor for tensor, like in pairs]
