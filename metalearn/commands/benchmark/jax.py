"""The meta-gradient in JAX: ``jit(value_and_grad(mean of vmap(task)))``, with ``lax.scan`` over the inner steps.

A convolution is as many strided slices as its kernel has pixels, concatenated, times a matrix: on a CPU faster than
XLA's own, which batches tasks with different weights poorly. Only the models that are translated here are supported.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.dlpack import from_dlpack

from metalearn.core.types import Episodes, Loss, MetaGradient, Params
from metalearn.inner import InnerLoop
from metalearn.metagrad.baselines.common import UnsupportedSettingError, as_leaf_params, check_supported
from metalearn.models import MLP, Conv4

_NETWORKS = (Conv4, MLP)
Layers = tuple[tuple[Any, ...], ...]
"""A network as data that can be hashed: the kind, the parameters' prefix and the settings of each layer."""


@functools.cache
def num_threads() -> int | None:
    """Start JAX with torch's number of threads, for the whole process, and return the number that it has.

    ``None`` where that cannot be told: on other systems than Linux, and before jaxlib 0.7. Too late if the process has
    used JAX before. Left to itself, JAX takes a thread for each core it may run on.
    """
    os.environ["NPROC"] = str(torch.get_num_threads())  # XLA's pool reads it when it is created, and nothing else
    jax.config.update("jax_platforms", "cpu")
    jax.devices()
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    return sum(name.startswith("tf_XLAEigen") for name in names) or None


def meta_gradient(
    module: nn.Module, episodes: Episodes, inner: InnerLoop, *, loss: Loss = cross_entropy, params: Params | None = None
) -> MetaGradient:
    """Compute ``metalearn.meta_gradient`` of ``Conv4`` with strides, or ``MLP``, as ``common.Baseline`` describes it.

    The first call for new shapes compiles. Arrays share their memory with the tensors.
    """
    check_supported("JAX", inner, {})
    if type(module) not in _NETWORKS:
        offered = f"here it computes {', '.join(network.__name__ for network in _NETWORKS)}"
        raise UnsupportedSettingError("JAX", f"the model {type(module).__name__}", offered)
    theta = as_leaf_params(module, params, inner)
    if loss is not cross_entropy or theta.keys() != dict(module.named_parameters()).keys():
        raise UnsupportedSettingError("JAX", "this loss, or frozen parameters", "here it takes cross_entropy and none")
    if episodes.query_x.device.type != "cpu":
        raise UnsupportedSettingError("JAX", f"device={episodes.query_x.device}", "here it computes on the CPU")
    layers = _translate(module)
    num_threads()
    jax.config.update("jax_enable_x64", episodes.query_x.dtype == torch.float64)
    arrays = {name: jnp.from_dlpack(p.detach().contiguous()) for name, p in theta.items()}
    tasks = episodes.support_x, episodes.support_y.int(), episodes.query_x, episodes.query_y.int()
    settings = {"layers": layers, "steps": inner.steps, "lr": inner.lr, "second_order": inner.second_order}
    found = jax.block_until_ready(_meta_step(arrays, *(jnp.from_dlpack(t.contiguous()) for t in tasks), **settings))
    value, grads, *others = jax.tree.map(from_dlpack, found)
    return MetaGradient(value, {name: grads[name] for name in theta}, *others)


@functools.partial(jax.jit, static_argnames=("layers", "steps", "lr", "second_order"))
def _meta_step(theta: Any, *tasks: Any, layers: Layers, steps: int, lr: float, second_order: bool) -> Any:
    def loss_and_logits(fast: Any, x: Any, y: Any) -> Any:
        logits = _apply(layers, fast, x)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1).mean(), logits

    def one_task(theta: Any, support_x: Any, support_y: Any, query_x: Any, query_y: Any) -> Any:
        def inner_step(fast: Any, _: None) -> Any:
            (value, _), grads = jax.value_and_grad(loss_and_logits, has_aux=True)(fast, support_x, support_y)
            grads = grads if second_order else jax.lax.stop_gradient(grads)
            return jax.tree.map(lambda p, g: p - lr * g, fast, grads), value

        fast, support_losses = jax.lax.scan(inner_step, theta, None, length=steps)
        query_loss, logits = loss_and_logits(fast, query_x, query_y)
        return query_loss, (logits, support_losses)

    def mean_loss(theta: Any) -> Any:
        matrices = {n: p.transpose(2, 3, 1, 0).reshape(-1, len(p)) if p.ndim == 4 else p for n, p in theta.items()}
        losses, others = jax.vmap(one_task, in_axes=(None, 0, 0, 0, 0))(matrices, *tasks)
        return losses.mean(), others

    (value, (predictions, support_losses)), grads = jax.value_and_grad(mean_loss, has_aux=True)(theta)
    return value, grads, predictions, support_losses.mean(axis=0)


def _translate(module: nn.Module, name: str = "") -> Layers:
    """Return the layers of a module; raise ``UnsupportedSettingError`` naming one that has no translation."""

    def of(child: str) -> Layers:
        return _translate(module.get_submodule(child), f"{name}{child}.")

    match module:
        case Conv4():
            return (("channels_last",), *of("features"), ("mean",), *of("head"))
        case MLP():
            return of("layers")
        case nn.Sequential():
            return tuple(layer for child, _ in module.named_children() for layer in of(child))
        case nn.Conv2d(groups=1, dilation=(1, 1), bias=None, padding_mode="zeros"):
            return (("conv", name, module.kernel_size[0], module.stride[0], int(module.padding[0])),)
        case nn.BatchNorm1d(affine=True, running_mean=None) | nn.BatchNorm2d(affine=True, running_mean=None):
            return (("norm", name, module.eps),)
        case nn.Linear(bias=nn.Parameter()):
            return (("linear", name),)
        case nn.ReLU():
            return (("relu",),)
        case nn.MaxPool2d():
            # jaxlib 0.6.2 and 0.10.2: the gradient is as far off as it is long, and right without the pass "fusion".
            raise UnsupportedSettingError("JAX", "max-pooling", "XLA's fusion on CPUs computes another gradient")
        case nn.Flatten():
            return (("flatten",),)
    raise UnsupportedSettingError("JAX", f"the layer {module}", "here it computes those of Conv4 and MLP")


def _apply(layers: Layers, params: Any, x: Any) -> Any:
    """Return the network's output; images are ``[examples, height, width, channels]`` after the first layer."""
    for kind, *settings in layers:
        match kind, *settings:
            case "channels_last", *_:
                x = x.transpose(0, 2, 3, 1)
            case "conv", name, size, stride, padding:
                x = _convolve(x, params[f"{name}weight"], size, stride, padding)
            case "norm", name, eps:
                axes = tuple(range(x.ndim - 1))
                mean = x.mean(axes)
                variance = ((x - mean) ** 2).mean(axes)
                x = (x - mean) * jax.lax.rsqrt(variance + eps) * params[f"{name}weight"] + params[f"{name}bias"]
            case "linear", name:
                x = x @ params[f"{name}weight"].T + params[f"{name}bias"]
            case "relu", *_:
                x = jax.nn.relu(x)
            case "mean", *_:
                x = x.mean((1, 2))
            case "flatten", *_:
                x = x.reshape(len(x), -1)
    return x


def _convolve(x: Any, matrix: Any, size: int, stride: int, padding: int) -> Any:
    """Return the convolution with a square kernel, given as ``[size * size * inputs, outputs]``."""
    examples, height, width, _ = x.shape
    h, w = ((side + 2 * padding - size) // stride + 1 for side in (height, width))
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    ends = stride * (h - 1) + 1, stride * (w - 1) + 1
    corners = [(i, j) for i in range(size) for j in range(size)]
    windows = [x[:, i : i + ends[0] : stride, j : j + ends[1] : stride] for i, j in corners]
    patches = jnp.concatenate(windows, axis=-1).reshape(examples * h * w, -1)
    return (patches @ matrix).reshape(examples, h, w, -1)
