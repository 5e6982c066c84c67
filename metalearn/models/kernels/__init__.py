"""Layers of T tasks with weights of their own, faster than what ``vmap`` makes of torch's; on CPUs."""

from metalearn.models.kernels.batch_norm import batch_norm
from metalearn.models.kernels.conv2d import convolution
from metalearn.models.kernels.dispatch import STACKED_LAYERS, kernels_support
from metalearn.models.kernels.relu import relu

__all__ = ["STACKED_LAYERS", "batch_norm", "convolution", "kernels_support", "relu"]
