"""Count and draw the nodes of the graph that autograd differentiates.

A node is the backward formula of one operation. ``tensor.grad_fn`` is that of the last operation; its
``next_functions`` lead to those of its inputs, and so on down to ``AccumulateGrad``, the node of a leaf that requires a
gradient. Inputs that need no gradient have no node.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from matplotlib.axes import Axes
from torch import Tensor
from torch.autograd.graph import Node

from metalearn.lessons.lesson import BLUE, VERMILION


def inputs(node: Node) -> list[Node]:
    """Return the nodes of a node's inputs that need a gradient."""
    return [child for child, _ in node.next_functions if child is not None]


def nodes(output: Tensor, *, without: Collection[Node] = ()) -> list[Node]:
    """Return every node reachable from the output, once each and inputs last (a topological order)."""
    found: list[Node] = []
    seen: set[Node] = set(without)
    stack: list[tuple[Node, bool]] = [(output.grad_fn, False)] if output.grad_fn is not None else []
    while stack:  # depth first without recursion, as a graph may be deeper than Python's stack
        node, inputs_done = stack.pop()
        if inputs_done:
            found.append(node)
        elif node not in seen:
            seen.add(node)
            stack += [(node, True), *((child, False) for child in inputs(node))]
    return found[::-1]


def paths(output: Tensor) -> int:
    """Count the paths from the output to a leaf; the chain rule has a term for each."""
    ways: dict[Node, int] = {}
    for node in reversed(nodes(output)):
        ways[node] = sum(ways[child] for child in inputs(node)) if inputs(node) else int(is_leaf(node))
    return ways[output.grad_fn] if output.grad_fn is not None else 0


def depth(output: Tensor) -> int:
    """Count the nodes on the longest path from the output to a leaf."""
    return 1 + max(_rows(nodes(output)).values(), default=-1)


def is_leaf(node: Node) -> bool:
    """Return whether the node is a leaf that requires a gradient."""
    return name_of(node) == "AccumulateGrad"


def name_of(node: Node) -> str:
    """Return the node's class as ``print(tensor.grad_fn)`` shows it, without its namespace."""
    return str(node.name()).rpartition("::")[2]


def draw(
    axes: Axes,
    output: Tensor,
    *,
    title: str,
    notes: dict[Node, str] | None = None,
    added: Collection[Node] = (),
    rows: int | None = None,
) -> None:
    """Draw a graph with the output on top; every arrow goes from an operation to its inputs, as the backward pass does.

    Some nodes have notes on their right; those ``added`` have another colour, to the right of those that they branch
    from. ``rows`` is the height, so that panels share a scale; ``None`` takes the height of the graph.
    """
    places = _layout(nodes(output), added)
    colours = {node: VERMILION if node in added else BLUE for node in places}
    boxes = {}
    for node, place in places.items():
        frame = {"boxstyle": "round,pad=0.3", "facecolor": "white", "edgecolor": colours[node], "linewidth": 1.6}
        boxes[node] = axes.text(*place, name_of(node), ha="center", va="center", fontsize=9, bbox=frame)
    for node, note in (notes or {}).items():
        axes.annotate(note, (1, 0.5), (7, 0), boxes[node], "offset points", va="center", fontsize=9, style="italic")
    for node, child in [(parent, child) for parent in places for child in inputs(parent)]:
        start, end = places[node], places[child]
        is_added = node in added or child in added
        passes_others = start[0] == end[0] and start[1] - end[1] > 1 and is_added
        style = {
            "arrowstyle": "-|>",
            "color": VERMILION if is_added else BLUE,
            "patchA": boxes[node].get_bbox_patch(),
            "patchB": boxes[child].get_bbox_patch(),
            "connectionstyle": f"arc3,rad={-1.2 if passes_others else 0}",
        }
        axes.annotate("", xy=end, xytext=start, arrowprops=style)
    columns, depths = zip(*places.values(), strict=True)
    height = -min(depths) if rows is None else rows - 1
    axes.set(xlim=(min(columns) - 0.6, max(columns) + 0.9), ylim=(-height - 0.5, 0.5))
    axes.set_title(title, fontsize=11)
    axes.axis("off")


def _layout(order: Sequence[Node], added: Collection[Node]) -> dict[Node, tuple[float, float]]:
    """Place every node: in the row of its longest path from the output, and a column near its parents."""
    aside = () if order[0] in added else added
    rows = _rows(order)
    parents: dict[Node, list[Node]] = {node: [] for node in order}
    for node in order:
        for child in inputs(node):
            parents[child].append(node)
    places: dict[Node, tuple[float, float]] = {}
    last_in_row: dict[int, float] = {}
    for node in sorted(order, key=lambda n: (rows[n], n in aside)):
        above = [places[parent][0] for parent in parents[node]]
        column = sum(above) / len(above) if above else 0.0
        column = max(column, 1.0) if node in aside else min(column, 0.0)
        column = max(column, last_in_row.get(rows[node], -math.inf) + 1)
        last_in_row[rows[node]] = column
        places[node] = (column, -float(rows[node]))
    return places


def _rows(order: Sequence[Node]) -> dict[Node, int]:
    """Return the length of the longest path from the output to each node."""
    rows = dict.fromkeys(order, 0)
    for node in order:
        for child in inputs(node):
            rows[child] = max(rows[child], rows[node] + 1)
    return rows
