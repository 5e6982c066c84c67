"""Networks to adapt; any other ``nn.Module`` does as well, through ``functionalize``."""

from metalearn.models.attention import PatchTransformer
from metalearn.models.conv4 import Conv4
from metalearn.models.mlp import MLP
from metalearn.models.residual import ResidualNet

__all__ = ["MLP", "Conv4", "PatchTransformer", "ResidualNet"]
