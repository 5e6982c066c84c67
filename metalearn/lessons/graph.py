"""Count and draw what ``create_graph=True`` adds to the graph of x^2, and of one MAML step.

    theta' = theta - alpha dL_support(theta)/dtheta,    then    L_query(theta')

First order treats the gradient as a constant: its operations leave no node. Second order keeps them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor
from torch.autograd.graph import Node

from metalearn.core.params import expand_over_tasks
from metalearn.core.types import Params
from metalearn.inner import InnerLoop, inner_step, task_losses
from metalearn.lessons.graph_drawing import depth, draw, inputs, is_leaf, name_of, nodes, paths
from metalearn.lessons.lesson import BLUE, VERMILION, Check, Lesson, leaf, panels, source_of

_CLAIM = """\
autograd records a node for every operation that a gradient will have to pass through. With create_graph=True the \
backward pass is recorded as well, so the gradient has a graph of its own; without it, it has none.

In a MAML step the whole difference is one edge. The update theta - alpha g has two inputs: theta, and the inner \
gradient g. In first order g has no graph, and only the path through theta is left. In second order g adds the nodes \
of its own computation, with the support pass that they use. Without them the second-order graph is the first-order \
one.

Every path from the query loss to theta is a term of the chain rule. First order has one. For tanh(theta x) second \
order has two more, the two terms of the Hessian: through the residual (Gauss-Newton) and through the slope of \
tanh."""


class Step(NamedTuple):
    """The query loss after one inner step, and the adapted weight."""

    query: Tensor
    fast: Tensor


def one_step(*, second_order: bool) -> Step:
    """Take one inner step of a model with one weight."""
    theta = expand_over_tasks({"w": leaf(0.5)}, 1)
    inner = InnerLoop(lr=0.1, steps=1, second_order=second_order)
    fast, _ = inner_step(predict, theta, SUPPORT[0], SUPPORT[1], inner, loss=squared_error, k=0)
    query, _ = task_losses(predict, fast, QUERY[0], QUERY[1], loss=squared_error)
    return Step(query.sum(), fast["w"])


def predict(params: Params, x: Tensor) -> Tensor:
    """Compute the model tanh(w x)."""
    return torch.tanh(params["w"] * x)


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Average over the task's examples."""
    return ((prediction - target) ** 2).mean()


def square_and_derivative(*, create_graph: bool) -> tuple[Tensor, Tensor]:
    """Return x^2 at 3 and its derivative."""
    x = leaf(3.0)
    y = x**2
    (dy,) = torch.autograd.grad(y, x, create_graph=create_graph)
    return y, dy


SUPPORT = torch.tensor([[[1.0, 2.0]], [[0.8, -0.4]]], dtype=torch.float64)
QUERY = torch.tensor([[[-1.0, 1.5]], [[-0.5, 0.2]]], dtype=torch.float64)
"""Inputs and targets of one task of two examples."""


def lesson() -> Lesson:
    """Run the lesson."""
    (y, dy), (_, constant) = square_and_derivative(create_graph=True), square_and_derivative(create_graph=False)
    first, second = one_step(second_order=False), one_step(second_order=True)
    added = sorted(name_of(node) for node in _added(second))
    return Lesson(
        title="graph: what create_graph adds",
        claim=_CLAIM,
        code=source_of(leaf, predict, squared_error, square_and_derivative, one_step),
        checks=[*_square(y, dy, constant), *_maml(first, second)],
        notes=[
            f"nodes of x^2: {len(nodes(y))}; of its gradient with create_graph=True: {len(nodes(dy))}",
            f"nodes after one step: first order {len(nodes(first.query))}, second order {len(nodes(second.query))}",
            f"{len(added)} of these are reached through the inner gradient alone: {', '.join(added)}",
        ],
        plots={"square": _square_plot(y, dy), "maml_step": _maml_plot(first, second)},
    )


def _square(y: Tensor, dy: Tensor, constant: Tensor) -> list[Check]:
    return [
        Check("nodes of x^2: the power and the leaf", len(nodes(y)), 2),
        Check("nodes of its gradient, create_graph=False", len(nodes(constant)), 0),
        Check("nodes of its gradient, create_graph=True: more than x^2", str(len(nodes(dy)) > len(nodes(y))), "True"),
        Check("both graphs end in the same leaf, x", str(nodes(y)[-1] is nodes(dy)[-1]), "True"),
    ]


def _maml(first: Step, second: Step) -> list[Check]:
    without_gradient = len(nodes(second.query)) - len(_added(second))
    return [
        Check("inputs of theta - alpha g with a graph, first order", len(inputs(_update(first))), 1),
        Check("inputs of theta - alpha g with a graph, second order", len(inputs(_update(second))), 2),
        Check("second order's nodes without those that only g leads to", without_gradient, len(nodes(first.query))),
        Check("derivative of tanh's derivative, first order", _double_backward(first), "absent"),
        Check("derivative of tanh's derivative, second order", _double_backward(second), "present"),
        Check("paths from the query loss to theta, first order", paths(first.query), 1),
        Check("paths, second order: 1 and the Hessian's 2", paths(second.query), 3),
    ]


def _update(step: Step) -> Node:
    """Return the node of theta - alpha g."""
    assert step.fast.grad_fn is not None
    return step.fast.grad_fn


def _added(step: Step) -> set[Node]:
    """Return the nodes that the query loss reaches only through the inner gradient."""
    gradient = inputs(_update(step))[1:]  # the first input is theta
    return set(nodes(step.query)) - set(nodes(step.query, without=gradient))


def _double_backward(step: Step) -> str:
    names = map(name_of, nodes(step.query))
    return "present" if any("TanhBackwardBackward" in name for name in names) else "absent"


def _square_plot(y: Tensor, dy: Tensor) -> Figure:
    figure, axes = panels(2, width=8, height=3)
    new = set(nodes(dy)) - set(nodes(y))
    for panel, output, what in ((axes[0], y, "y = x²"), (axes[1], dy, "dy/dx, create_graph=True")):
        notes = {node: "x" for node in nodes(output) if is_leaf(node)}
        draw(panel, output, title=f"{what}: {len(nodes(output))} nodes", notes=notes, added=new, rows=4)
    return figure


_NODE_NOTES = {"TanhBackwardBackward0": "two ways on", "TanhBackward0": "support pass"}


def _maml_plot(first: Step, second: Step) -> Figure:
    figure, axes = panels(2, width=10, height=9, shares=(1, 1.5))
    for panel, step, order in ((axes[0], first, "first"), (axes[1], second, "second")):
        found, added = nodes(step.query), _added(step)
        notes = {node: "theta" for node in found if is_leaf(node)}
        notes |= {found[0]: "query loss", _update(step): "theta - alpha g"}
        notes |= dict.fromkeys(inputs(_update(step))[1:], "alpha g")
        notes |= {node: _NODE_NOTES[name_of(node)] for node in added if name_of(node) in _NODE_NOTES}
        title = f"{order} order: {len(found)} nodes"
        draw(panel, step.query, title=title, notes=notes, added=added, rows=depth(second.query))
    keys = [Patch(color=BLUE, label="in both orders"), Patch(color=VERMILION, label="through the inner gradient alone")]
    figure.legend(handles=keys, frameon=False, loc="outside lower center", ncols=2)
    return figure
