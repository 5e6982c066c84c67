"""A small transformer on image patches: one encoder block, the mean over tokens, and a linear head."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PatchTransformer(nn.Module):
    """Patches to tokens, one pre-norm block of self-attention and an MLP (Dosovitskiy et al. 2021, eq. 1-4).

    Args:
        ways: N, the number of outputs.
        channels: of the input images.
        size: height and width of the images, in pixels.
        patch: height and width of a patch; divides ``size``.
        width: features of a token; a multiple of ``heads``.
        heads: of the attention.

    Shapes: ``[examples, channels, size, size]`` to logits ``[examples, ways]``.

    Raises:
        ValueError: if the patches do not fill the image.

    Example:
        >>> PatchTransformer(ways=5)(torch.zeros(10, 1, 28, 28)).shape
        torch.Size([10, 5])

    Reference: Dosovitskiy et al. 2021, arXiv 2010.11929.
    """

    def __init__(
        self, ways: int, *, channels: int = 1, size: int = 28, patch: int = 7, width: int = 32, heads: int = 4
    ) -> None:
        super().__init__()
        if size % patch:
            raise ValueError(f"PatchTransformer: patch={patch} does not divide size={size}.")
        self.patches = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)
        self.positions = nn.Parameter(0.02 * torch.randn((size // patch) ** 2, width))
        self.block = nn.TransformerEncoderLayer(
            width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.head = nn.Linear(width, ways)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[examples, ways]`` of images ``[examples, channels, size, size]``."""
        tokens = self.patches(x).flatten(start_dim=2).transpose(1, 2) + self.positions
        logits: Tensor = self.head(self.block(tokens).mean(dim=1))
        return logits
