"""Model-agnostic meta-learning with second-order gradients that are visible, provably right and cheap.

    >>> forward, theta = functionalize(model)
    >>> result = meta_gradient(forward, theta, episodes, InnerLoop(lr=0.4, steps=1, second_order=True))

Names are imported when they are first used, so that what needs no torch (checking a configuration) need not wait
for it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metalearn import derivatives, gradcheck
    from metalearn.errors import NonFiniteLossError
    from metalearn.inner import InnerLoop, adapt, predict
    from metalearn.metagrad import meta_gradient
    from metalearn.params import functionalize
    from metalearn.types import Episodes, Forward, Loss, MetaGradient, Params

__version__ = "0.1.0"

__all__ = [
    "Episodes",
    "Forward",
    "InnerLoop",
    "Loss",
    "MetaGradient",
    "NonFiniteLossError",
    "Params",
    "adapt",
    "derivatives",
    "functionalize",
    "gradcheck",
    "meta_gradient",
    "predict",
]

_HOMES = {
    "Episodes": "types",
    "Forward": "types",
    "InnerLoop": "inner",
    "Loss": "types",
    "MetaGradient": "types",
    "NonFiniteLossError": "errors",
    "Params": "types",
    "adapt": "inner",
    "functionalize": "params",
    "meta_gradient": "metagrad",
    "predict": "inner",
}


def __getattr__(name: str) -> Any:
    if name in ("derivatives", "gradcheck"):
        return importlib.import_module(f"metalearn.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'metalearn' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(importlib.import_module(f"metalearn.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
