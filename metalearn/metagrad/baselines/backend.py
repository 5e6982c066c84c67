"""Let a training use another library's meta-gradient (``algorithm.backend``)."""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from metalearn.core.errors import ConfigError
from metalearn.core.types import Episodes, Loss, MetaGradient, Params
from metalearn.inner import InnerLoop
from metalearn.metagrad.baselines.common import (
    NOT_INSTALLED,
    PEERS,
    Baseline,
    check_supported,
    copy_params_,
    installed_peers,
    trainable,
)

BACKENDS = tuple(PEERS.values())
"""Names for ``backend``."""


@dataclass(frozen=True, eq=False)
class BaselineGradient:
    """A meta-gradient by another library, at any theta. Made by ``backend``."""

    baseline: Baseline
    module: nn.Module  # a private copy, into which theta is copied
    loss: Loss
    name: str

    def check_supported(self, inner: InnerLoop) -> None:
        """Raise ``UnsupportedSettingError`` if the library does not compute a setting of ``inner``."""
        check_supported(self.name, inner, sys.modules[self.baseline.__module__].SUPPORTED)

    def __call__(self, params: Params, episodes: Episodes, inner: InnerLoop) -> MetaGradient:
        """Compute ``metalearn.meta_gradient`` at ``params``, which are not changed and need not require gradients.

        Raises:
            UnsupportedSettingError: naming the setting of ``inner`` that the library does not support.
            ValueError: if ``params`` or ``inner`` do not fit the module.
        """
        copy_params_(self.module, params)
        own = trainable(self.module)
        theta = {name: own.get(name, p) for name, p in params.items()}
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            return self.baseline(self.module, episodes, inner, loss=self.loss, params=theta)


def backend(name: str, module: nn.Module, *, loss: Loss = cross_entropy) -> BaselineGradient:
    """Return the meta-gradient of one model by another library.

    Args:
        name: one of ``BACKENDS``.
        module: the model. It is copied once, here, and not changed; later changes of its frozen parameters, buffers or
            mode have no effect.
        loss: one task's mean loss.

    Raises:
        ConfigError: if the name is unknown, or the library is not installed or cannot be imported.

    Examples:
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
