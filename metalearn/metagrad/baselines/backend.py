"""Training through a peer: a meta-gradient at any theta from another library, as metalearn's own gives it."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from metalearn.core.errors import ConfigError
from metalearn.core.types import Episodes, Loss, MetaGradient, Params
from metalearn.inner import InnerLoop
from metalearn.metagrad.baselines.common import trainable, write
from metalearn.metagrad.baselines.installed import NOT_INSTALLED, PEERS, installed_peers
from metalearn.metagrad.baselines.offers import check_supported

BACKENDS = tuple(PEERS.values())
"""Names for ``backend``."""


@dataclass(frozen=True, eq=False)
class BaselineGradient:
    """A meta-gradient from a peer, at any theta. Made by ``backend``.

    Args:
        peer: its ``meta_gradient``.
        module: into which theta is copied: nobody else's.
        loss: one task's mean loss.
        name: of the peer.
    """

    peer: Callable[..., MetaGradient]
    module: nn.Module
    loss: Loss
    name: str

    def refuse(self, inner: InnerLoop) -> None:
        """Refuse what the peer does not offer, before anything is computed.

        Raises:
            NotOfferedError: naming the setting of ``inner``.
        """
        offers = sys.modules[self.peer.__module__].OFFERS
        check_supported(self.name, inner, offers=offers)

    def __call__(self, params: Params, episodes: Episodes, inner: InnerLoop) -> MetaGradient:
        """The peer's meta-gradient at ``params``, which are not changed and need not require gradients.

        Args:
            params: theta, each ``[...]``, with learned step sizes if ``inner`` has them.
            episodes: T tasks.
            inner: the inner loop.

        Returns:
            As ``metalearn.meta_gradient``; ``grads`` has the names of ``params``.

        Raises:
            NotOfferedError: naming the setting of ``inner`` that the peer does not offer.
            ValueError: if ``params`` or ``inner`` do not fit the module.
        """
        write(self.module, params)
        own = trainable(self.module)
        theta = {name: own.get(name, p) for name, p in params.items()}
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            return self.peer(self.module, episodes, inner, loss=self.loss, params=theta)


def backend(name: str, module: nn.Module, *, loss: Loss = cross_entropy) -> BaselineGradient:
    """A peer to train through, of one model.

    Args:
        name: one of ``BACKENDS``.
        module: the model. It is copied once, here: later changes of its frozen parameters, its buffers or its mode are
            not seen, and it is not changed.
        loss: one task's mean loss.

    Returns:
        ``compute(params, episodes, inner) -> MetaGradient``.

    Raises:
        ConfigError: if there is no peer of that name, or its library is not installed or cannot be imported.

    Example:
        >>> forward, theta = functionalize(module)
        >>> compute = backend("higher", module)
        >>> grads = compute(theta, episodes, InnerLoop(lr=0.1, steps=2)).grads
    """
    if name not in BACKENDS:
        raise ConfigError(f"algorithm.backend={name}: must be one of metalearn, {', '.join(BACKENDS)}.")
    peers, missing = installed_peers({name: name})
    if name in missing:
        why = "is not installed" if missing[name] == NOT_INSTALLED else missing[name]
        raise ConfigError(
            f"algorithm.backend={name}: the library {name} {why}. Install it with `pip install -r "
            "requirements-peers.txt`, or take algorithm.backend=metalearn, which needs none."
        )
    return BaselineGradient(peers[name], copy.deepcopy(module), loss, name)
