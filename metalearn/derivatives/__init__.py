"""Second and higher derivatives of scalar functions, at the price of a few gradients where that is possible.

A point ``x`` is a Tensor or a dictionary of Tensors, and what is returned is of the same kind. Nothing is changed in
place, and where ``f`` is constant the derivatives are zeros.
"""

from metalearn.derivatives.eigenvalues import top_eigenvalues
from metalearn.derivatives.hessian import available_memory, hessian, hessian_bytes
from metalearn.derivatives.hvp import HVP_MODES, gauss_newton_vp, gradient, hvp
from metalearn.derivatives.inputs import Point, ScalarFunction
from metalearn.derivatives.nth_derivative import nth_derivative

__all__ = [
    "HVP_MODES",
    "Point",
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
