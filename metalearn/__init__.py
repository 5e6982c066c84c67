"""Model-agnostic meta-learning with second-order gradients that are visible, provably right and cheap.

    >>> forward, theta = functionalize(model)
    >>> result = meta_gradient(forward, theta, episodes, InnerLoop(lr=0.4, steps=1, second_order=True))

Names are imported on first use, so that checking a configuration need not wait for torch.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metalearn import algorithms, derivatives
    from metalearn.algorithms import Algorithm
    from metalearn.core.errors import NonFiniteLossError
    from metalearn.core.functional import functionalize
    from metalearn.core.module_parts import module_parts
    from metalearn.core.profiling.hardware import configure_malloc
    from metalearn.core.types import Episodes, Forward, Loss, MetaGradient, Params
    from metalearn.data.collate import batches
    from metalearn.derivatives import gradcheck
    from metalearn.inference.learner import Learner
    from metalearn.inference.loading import load
    from metalearn.inner import (
        SGD,
        Adagrad,
        Adam,
        GradientTransform,
        InnerLoop,
        MetaCurvature,
        Momentum,
        RMSprop,
        UpdateRule,
        adapt,
        predict,
        with_learned_lrs,
        with_per_step_params,
        with_transform,
    )
    from metalearn.metagrad import meta_gradient

__version__ = "0.1.0"

_SPIN_COUNT = "100000"
"""Turns for which a CPU thread of torch waits for others before it sleeps; GNU's OpenMP takes 300,000."""

__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "Algorithm",
    "Episodes",
    "Forward",
    "GradientTransform",
    "InnerLoop",
    "Learner",
    "Loss",
    "MetaCurvature",
    "MetaGradient",
    "Momentum",
    "NonFiniteLossError",
    "Params",
    "RMSprop",
    "UpdateRule",
    "adapt",
    "algorithms",
    "batches",
    "configure_malloc",
    "derivatives",
    "functionalize",
    "gradcheck",
    "load",
    "meta_gradient",
    "module_parts",
    "parts_of",
    "predict",
    "with_learned",
    "with_learned_lrs",
    "with_per_step_params",
    "with_steps",
    "with_transform",
]

_HOMES = {
    "SGD": "inner",
    "Adagrad": "inner",
    "Adam": "inner",
    "Algorithm": "algorithms",
    "Episodes": "core.types",
    "Forward": "core.types",
    "GradientTransform": "inner",
    "InnerLoop": "inner",
    "Learner": "inference.learner",
    "Loss": "core.types",
    "MetaCurvature": "inner",
    "MetaGradient": "core.types",
    "Momentum": "inner",
    "NonFiniteLossError": "core.errors",
    "Params": "core.types",
    "RMSprop": "inner",
    "UpdateRule": "inner",
    "adapt": "inner",
    "batches": "data.collate",
    "configure_malloc": "core.profiling.hardware",
    "functionalize": "core.functional",
    "load": "inference.loading",
    "meta_gradient": "metagrad",
    "module_parts": "core.module_parts",
    "predict": "inner",
    "with_learned_lrs": "inner",
    "with_per_step_params": "inner",
    "with_transform": "inner",
}

_RENAMED = {
    "parts_of": "module_parts",
    "with_learned": "with_learned_lrs",
    "with_steps": "with_per_step_params",
}
"""Former names, which still work and warn when they are called."""

_MODULES = {"algorithms": "algorithms", "derivatives": "derivatives", "gradcheck": "derivatives.gradcheck"}


def _limit_spinning() -> None:
    """Let torch's CPU threads sleep sooner while they wait for each other, unless torch is loaded or the user chose.

    They wait at each of a meta-step's 1,500 operations. Beside other work on all cores the thread that is waited for
    does not run, and those that wait keep its core: without this limit, a meta-step took 1.6 to 2.3 times as long.
    """
    if "torch" not in sys.modules and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = _SPIN_COUNT


_limit_spinning()


def __getattr__(name: str) -> Any:
    if new := _RENAMED.get(name):
        return _renamed(name, new)
    if name in _MODULES:
        return importlib.import_module(f"metalearn.{_MODULES[name]}")
    if name not in _HOMES:
        raise AttributeError(f"module 'metalearn' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(importlib.import_module(f"metalearn.{_HOMES[name]}"), name)


def _renamed(name: str, new: str) -> Callable[..., Any]:
    """Return a function under its former name; a warning comes with each call, and not with ``import *``."""
    function = __getattr__(new)

    @functools.wraps(function)
    def renamed(*args: Any, **kwargs: Any) -> Any:
        warnings.warn(f"metalearn.{name} is called metalearn.{new} now", FutureWarning, stacklevel=2)
        return function(*args, **kwargs)

    return renamed


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
