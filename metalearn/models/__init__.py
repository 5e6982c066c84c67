"""Models to adapt; any other ``nn.Module`` works as well, through ``functionalize``."""

from metalearn.models.cavia import ContextConv4, ContextMLP
from metalearn.models.conv4 import Conv4
from metalearn.models.mlp import MLP
from metalearn.models.resnet12 import ResNet12

__all__ = [
    "MLP",
    "ContextConv4",
    "ContextMLP",
    "Conv4",
    "ResNet12",
]
