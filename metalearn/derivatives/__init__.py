"""Second and higher derivatives of scalar functions, at the cost of a few gradients where possible.

An input ``x`` is a Tensor or a dictionary of Tensors, and so is the result. Nothing is changed in place; the
derivatives of a constant are zeros.
"""

import warnings
from typing import Any

from metalearn.derivatives.eigenvalues import top_eigenvalues
from metalearn.derivatives.hessian import available_memory, hessian, hessian_bytes
from metalearn.derivatives.hvp import HVP_MODES, gauss_newton_vp, gradient, hvp
from metalearn.derivatives.inputs import Input, ScalarFunction
from metalearn.derivatives.nth_derivative import nth_derivative

__all__ = [
    "HVP_MODES",
    "Input",
    "ScalarFunction",
    "available_memory",
    "gauss_newton_vp",
    "gradient",
    "hessian",
    "hessian_bytes",
    "hvp",
    "nth_derivative",
    "top_eigenvalues",
]

_RENAMED = {"Point": "Input", "free_bytes": "available_memory"}
"""Former names, which still work and warn."""


def __getattr__(name: str) -> Any:
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"derivatives.{name} is called {_RENAMED[name]} now", FutureWarning, stacklevel=2)
    return globals()[_RENAMED[name]]
