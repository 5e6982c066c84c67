"""Lessons on second and higher derivatives, one per module; ``metalearn gradients`` runs them."""

from __future__ import annotations

from collections.abc import Callable

from metalearn.lessons import (
    backward,
    big_product,
    create_graph,
    dense_hessian,
    finite_differences,
    graph,
    hvp,
    maml,
    newton,
    nth_order,
    pinn,
    sharpness,
)
from metalearn.lessons.lesson import Check, Lesson

LESSONS: dict[str, Callable[[], Lesson]] = {
    "create_graph": create_graph.lesson,
    "backward": backward.lesson,
    "orders": nth_order.lesson,
    "graph": graph.lesson,
    "hvp": hvp.lesson,
    "dense_hessian": dense_hessian.lesson,
    "finite_differences": finite_differences.lesson,
    "big_product": big_product.lesson,
    "newton": newton.lesson,
    "sharpness": sharpness.lesson,
    "pinn": pinn.lesson,
    "maml": maml.lesson,
}
"""Every lesson in teaching order, by the name for ``lesson=``."""

__all__ = ["LESSONS", "Check", "Lesson"]
