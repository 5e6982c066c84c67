"""Networks to adapt; any other ``nn.Module`` does as well, through ``functionalize``."""

from metalearn.models.conv4 import Conv4
from metalearn.models.mlp import MLP

__all__ = ["MLP", "Conv4"]
