"""Models with context parameters phi, the only ones that are adapted to a task (CAVIA).

    phi_0 = 0,    phi_{k+1} = phi_k - alpha dL_support(phi_k, theta) / dphi_k,    theta shared by all tasks

(Zintgraf et al. 2019, arXiv 1810.03642, algorithm 1.) The inner loop needs two settings:

    names = module_parts(module).context_params
    InnerLoop(lr=1.0, steps=2, adapted_params=names, initializer=ZeroContext(names))
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metalearn.models.conv4 import Conv4
from metalearn.models.mlp import MLP


class ContextMLP(nn.Module):
    """An MLP with ReLU on the input concatenated with phi, ``f([x, phi])``.

    With ``inputs=outputs=1`` this is the network of CAVIA's sinusoid experiments.

    Args:
        inputs: features of one example, after flattening.
        outputs: number of outputs.
        hidden: width of each hidden layer.
        context: C, the entries of phi; 4 or 5 on sinusoids.

    Attributes:
        context: phi, ``[C]``, at first 0.

    Shapes: ``[examples, ...]`` with ``inputs`` entries an example, to ``[examples, outputs]``.

    Raises:
        ValueError: if ``context`` is below 1.

    Examples:
        >>> ContextMLP(1, 1)(torch.zeros(10, 1)).shape
        torch.Size([10, 1])
    """

    def __init__(self, inputs: int, outputs: int, *, hidden: Sequence[int] = (40, 40), context: int = 5) -> None:
        super().__init__()
        self.context = _zero_context("ContextMLP", context)
        network = MLP(inputs + context, outputs, hidden=hidden, batch_norm=False)
        self.layers = nn.Sequential(*network.layers[1:])  # the input is flattened before phi joins it

    def forward(self, x: Tensor) -> Tensor:
        """Return outputs ``[examples, outputs]`` of inputs ``[examples, ...]``."""
        return self.layers(torch.cat([x.flatten(1), self.context.expand(len(x), -1)], dim=1))


class ContextConv4(nn.Module):
    """``Conv4`` whose third block is scaled and shifted per channel by an affine function of phi (FiLM).

        (gamma, beta) = W phi + b,    h_3 = relu(gamma * pool(BN(conv(h_2))) + beta)

    as in CAVIA's experiments on mini-ImageNet, in the order of its authors' code. W and b belong to theta. Unlike in
    their code, b is initialised to gamma = 1 and beta = 0, so that the network starts as ``Conv4``, and the head takes
    the mean over positions, as ``Conv4`` does.

    Args:
        ways: N, the number of classes.
        channels: of the input images.
        width: filters of every convolution.
        pool: ``"stride"`` or ``"max"``, see ``Conv4``.
        context: C, the entries of phi; the paper's 100.

    Attributes:
        context: phi, ``[C]``, at first 0.

    Shapes: ``[examples, channels, height, width]`` to logits ``[examples, ways]``; sizes like ``Conv4``.

    Raises:
        ValueError: if ``pool`` is unknown or ``context`` is below 1.

    Examples:
        >>> ContextConv4(ways=5)(torch.zeros(10, 1, 28, 28)).shape
        torch.Size([10, 5])

    Reference: Zintgraf et al. 2019, arXiv 1810.03642; Perez et al. 2018 (FiLM), arXiv 1709.07871.
    """

    def __init__(self, ways: int, *, channels: int = 1, width: int = 64, pool: str = "max", context: int = 100) -> None:
        super().__init__()
        self.context = _zero_context("ContextConv4", context)
        self.film = nn.Linear(context, 2 * width)
        with torch.no_grad():
            self.film.bias.copy_(torch.cat([torch.ones(width), torch.zeros(width)]))
        network = Conv4(ways, channels=channels, width=width, pool=pool)
        self.features, self.head = network.features, network.head

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[examples, ways]`` of images ``[examples, channels, height, width]``."""
        first, second, third, fourth = self.features
        conv, norm, relu, *pool = third.children()
        h = norm(conv(second(first(x))))
        for layer in pool:
            h = layer(h)
        gamma, beta = self.film(self.context).view(2, -1, 1, 1)
        h = relu(gamma * h + beta)
        return self.head(fourth(h).mean(dim=(-2, -1)))


def _zero_context(model: str, entries: int) -> nn.Parameter:
    if entries < 1:
        raise ValueError(f"{model}: context={entries!r}; it must be 1 or more, as nothing else is adapted.")
    return nn.Parameter(torch.zeros(entries))
