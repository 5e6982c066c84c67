"""Second and higher derivatives of scalar functions, at the price of a few gradients where that is possible.

A point ``x`` is a Tensor or a dictionary of Tensors, and what is returned is of the same kind. Nothing is changed in
place, and where ``f`` is constant the derivatives are zeros.
"""

from metalearn.derivatives.dense import free_bytes, hessian, hessian_bytes
from metalearn.derivatives.nth import nth_derivative
from metalearn.derivatives.points import Point, ScalarFunction
from metalearn.derivatives.products import HVP_MODES, gauss_newton_vp, gradient, hvp
from metalearn.derivatives.spectrum import top_eigenvalues

__all__ = [
    "HVP_MODES",
    "Point",
    "ScalarFunction",
    "free_bytes",
    "gauss_newton_vp",
    "gradient",
    "hessian",
    "hessian_bytes",
    "hvp",
    "nth_derivative",
    "top_eigenvalues",
]
